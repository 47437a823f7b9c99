"""What the sides of several comparisons share: the optimizer, the checkpoint they start from, parts of TRL and tunix.

What is heavy is imported where it is used, for an environment that has nothing but one of them and numpy.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

LEARNING_RATE, MAX_NORM, BETAS, EPSILON = 1e-6, 1.0, (0.9, 0.999), 1e-8
TUNIX_ROPE_THETA = 1_000_000  # whatever its config says
LOWEST_ID = 5  # of random tokens, so that no side takes one for padding, a beginning or an end


def save_random_model(shape: str, folder: str, platform: str, as_tunix: bool, seed: int = 0) -> None:
    """Write a checkpoint of that preset, drawn on that platform; with the RoPE that tunix has, if so."""
    import jax

    from models.llama import PRESETS, LLaMa, save_pretrained

    jax.config.update("jax_platforms", platform)
    config = PRESETS[shape]
    if as_tunix:
        config = dataclasses.replace(config, rope_theta=float(TUNIX_ROPE_THETA), rope_scaling=None)
    save_pretrained(jax.jit(lambda key: LLaMa(config, key=key))(jax.random.key(seed)), folder)


def word_tokenizer(vocabulary: int, *, end: int) -> Any:
    """transformers' tokenizer of texts whose words are token ids; that of the end of a text is "<end>"."""
    import tokenizers
    import transformers

    words = {str(number): number for number in range(vocabulary) if number != end} | {"<end>": end}
    numbers = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    numbers.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=numbers, eos_token="<end>", pad_token="<end>")


def tunix_mesh() -> Any:
    """Of one device."""
    import jax

    return jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def tunix_network(folder: str, mesh: Any) -> Any:
    """tunix's Llama of a checkpoint, in float32."""
    from tunix.models.llama3.model import ModelConfig
    from tunix.models.llama3.params import create_model_from_safe_tensors

    raw = json.loads((Path(folder) / "config.json").read_text())
    config = ModelConfig(
        num_layers=raw["num_hidden_layers"],
        vocab_size=raw["vocab_size"],
        embed_dim=raw["hidden_size"],
        hidden_dim=raw["intermediate_size"],
        num_heads=raw["num_attention_heads"],
        head_dim=raw["head_dim"],
        num_kv_heads=raw["num_key_value_heads"],
        rope_theta=TUNIX_ROPE_THETA,
        norm_eps=raw["rms_norm_eps"],
        weight_tying=raw["tie_word_embeddings"],
    )
    return create_model_from_safe_tensors(folder, config, mesh)


def tunix_adamw() -> Any:
    """Clipping, and AdamW without weight decay, for tunix's trainers."""
    import optax

    b1, b2 = BETAS
    adam = optax.adamw(LEARNING_RATE, b1=b1, b2=b2, eps=EPSILON, weight_decay=0.0)
    return optax.chain(optax.clip_by_global_norm(MAX_NORM), adam)
