"""Logits beside `transformers` in float32, on tiny random networks of every family.

python -m benchmarks.parity prints the table of the README.
"""

import tempfile

import fire
import jax
import numpy as np

_TINY = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

NETWORKS: dict[str, tuple[str, dict]] = {
    "Llama, grouped-query attention": ("llama", {}),
    "Llama, multi-head attention, untied": ("llama", {"num_key_value_heads": 8}),
    "Llama, multi-query attention, tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "Llama, all biases, GELU": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "Llama, linear RoPE scaling": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "Llama, dynamic NTK RoPE scaling": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "Llama, Llama-3.1 RoPE scaling": ("llama", {"rope_scaling": _LLAMA3}),
    "Llama, YaRN RoPE scaling": ("llama", {"rope_scaling": _YARN}),
    "Mistral, window of 16 tokens": ("mistral", {"sliding_window": 16}),
    "Qwen2": ("qwen2", {}),
    "Qwen2, window of 16 in the last two layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    ),
    "Qwen3, head size not width / heads": ("qwen3", {"head_dim": 16}),
}


def main(tokens: int = 96) -> None:
    """Print the largest difference of logits over their largest size, each network on its own random text.

    `tokens` is the length of the text; the networks are made for 64, so that it reaches past their context.
    """
    jax.config.update("jax_platforms", "cpu")
    print(f"| network | max difference / max logit, {tokens} tokens |\n|---|---:|")
    for name, (family, changes) in NETWORKS.items():
        print(f"| {name} | {_difference(family, _TINY | changes, tokens):.1e} |", flush=True)


def _difference(family: str, settings: dict, tokens: int) -> float:
    import torch
    import transformers

    from models.llama import load_pretrained

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **settings)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.1)  # norms, biases and all, so that none can be left out unnoticed
    text = np.random.default_rng(0).integers(0, settings["vocab_size"], (2, tokens))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        theirs.save_pretrained(folder)
        ours = load_pretrained(folder)
        expected = theirs(torch.tensor(text)).logits.numpy()
    logits, _ = ours(text)
    return float(np.abs(np.asarray(logits) - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    fire.Fire(main)
