"""The network against `transformers`, in float32, on small random checkpoints that are saved by it and loaded by us."""

import jax
import numpy as np
import pytest

from models.llama.load import load_pretrained
from utils import kvcache

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(vocab_size=53, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=16, rms_norm_eps=1e-5, tie_word_embeddings=False)


def rope(kind, **parameters):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=1000.0, **parameters))


LLAMA_3 = rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = dict(factor=4.0, original_max_position_embeddings=16, beta_fast=2.0)
QWEN_WINDOWS = dict(use_sliding_window=True, sliding_window=5)

# Texts have 24 tokens, so every scaling goes past its context of 16 and every window is shorter than the text.
CASES = {
    "llama-gqa": ("Llama", dict()),
    "llama-mha": ("Llama", dict(num_key_value_heads=4)),
    "llama-mqa": ("Llama", dict(num_key_value_heads=1)),
    "llama-tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama-head-dim": ("Llama", dict(head_dim=12)),
    "llama-attention-bias": ("Llama", dict(attention_bias=True)),
    "llama-mlp-bias": ("Llama", dict(mlp_bias=True)),
    "llama-eps": ("Llama", dict(rms_norm_eps=0.1)),
    "llama-theta": ("Llama", rope("default")),
    "llama-linear": ("Llama", rope("linear", factor=3.0)),
    "llama-dynamic": ("Llama", rope("dynamic", factor=3.0)),
    "llama-llama3": ("Llama", LLAMA_3),
    "llama-yarn": ("Llama", rope("yarn", **YARN)),
    "llama-yarn-mscale": ("Llama", rope("yarn", **YARN, mscale=0.7, mscale_all_dim=1.3, truncate=False)),
    "mistral": ("Mistral", dict(sliding_window=5)),
    "mistral-no-window": ("Mistral", dict(sliding_window=None)),
    "qwen2": ("Qwen2", dict()),
    "qwen2-late-windows": ("Qwen2", dict(**QWEN_WINDOWS, max_window_layers=1)),
    "qwen2-all-windows": ("Qwen2", dict(**QWEN_WINDOWS, max_window_layers=0)),
    "qwen2-chosen-windows": (
        "Qwen2",
        dict(**QWEN_WINDOWS, layer_types=["sliding_attention", "full_attention"], tie_word_embeddings=True),
    ),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3-bias-windows": ("Qwen3", dict(head_dim=12, attention_bias=True, **QWEN_WINDOWS, max_window_layers=1)),
} | {
    f"llama-{name}": ("Llama", dict(hidden_act=name))
    for name in ("relu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
}


@jax.jit
def forward(model, tokens, **options):
    return model(tokens, **options)


@pytest.fixture
def both(tmp_path, request):
    """Their network and ours, of one random checkpoint; weights large enough that everything in it matters."""
    family, changes = CASES[request.param]
    config = getattr(transformers, f"{family}Config")(**(SIZES | changes), attn_implementation="eager")
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    theirs.save_pretrained(tmp_path)
    return theirs, load_pretrained(tmp_path)


def assert_near(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 24), np.int32)


@pytest.mark.parametrize("both", CASES, indirect=True)
def test_logits(both):
    theirs, ours = both
    with torch.no_grad():
        want = theirs(torch.from_numpy(TOKENS).long()).logits.numpy()
    got, _ = forward(ours, TOKENS)
    assert_near(np.asarray(got), want)


@pytest.mark.parametrize("both", ["llama-dynamic", "mistral", "qwen2-chosen-windows"], indirect=True)
def test_logits_with_a_cache(both):
    """In two pieces; the second goes past the context and, with dynamic rope, leaves the old keys as they are."""
    theirs, ours = both
    c = ours.config
    state = kvcache.create(c.num_layers, 2, c.num_kv_heads, 24, c.head_dim, dtype="float32")
    past = transformers.DynamicCache(config=theirs.config)
    for piece in (slice(0, 13), slice(13, 24)):
        with torch.no_grad():
            out = theirs(torch.from_numpy(TOKENS[:, piece]).long(), past_key_values=past, use_cache=True)
        got, state = forward(ours, TOKENS[:, piece], cache=state)
        assert_near(np.asarray(got), out.logits.numpy())


@pytest.mark.parametrize("both", ["llama-llama3", "qwen3-bias-windows"], indirect=True)
def test_gradients(both):
    """Of the mean negative log-likelihood, by the embeddings and one matrix that is stored transposed."""
    theirs, ours = both
    theirs(torch.from_numpy(TOKENS).long(), labels=torch.from_numpy(TOKENS).long()).loss.backward()

    @jax.jit
    @jax.grad
    def grads(model):
        log_probs = jax.nn.log_softmax(model(TOKENS)[0][:, :-1])
        return (
            -np.float32(1 / TOKENS[:, 1:].size) * log_probs[np.arange(2)[:, None], np.arange(23), TOKENS[:, 1:]].sum()
        )

    got = grads(ours)
    assert_near(np.asarray(got.embed_VD[...]), theirs.model.embed_tokens.weight.grad.numpy())
    for layer in range(SIZES["num_hidden_layers"]):
        want = theirs.model.layers[layer].mlp.down_proj.weight.grad.numpy().T
        assert_near(np.asarray(got.blocks.down_FD[...])[layer], want)
