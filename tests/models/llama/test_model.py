"""The network against itself: caches, padding, packing, causality, and that it reads everything it is given."""

import dataclasses
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.llama.config import LlamaConfig, config_from_hf
from models.llama.model import REMAT, LLaMa
from utils import kvcache
from utils.rope import DynamicScaling, LinearScaling, Llama3Scaling, YarnScaling

PLAIN = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    rope_theta=100.0,
    rope_scaling=None,
    tie_embeddings=False,
    activation="silu",
    gated=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    qk_norm=False,
    layer_windows=(None, None),
    initializer_range=0.3,
)
LLAMA_3 = Llama3Scaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8)
YARN = YarnScaling(factor=4.0, original_context=32, beta_fast=4.0, beta_slow=1.0, attention_factor=1.2, truncate=False)
CONFIGS = {
    "plain": PLAIN,
    "one-kv-head": replace(PLAIN, num_kv_heads=1, tie_embeddings=True),
    "window": replace(PLAIN, layer_windows=(3, 3)),
    "mixed-windows": replace(PLAIN, layer_windows=(None, 3), qkv_bias=True),
    "qk-norm": replace(PLAIN, qk_norm=True, rope_scaling=LLAMA_3),
    "plain-mlp": replace(PLAIN, gated=False, activation="gelu", out_bias=True, mlp_bias=True, rope_scaling=YARN),
}

every_config = pytest.mark.parametrize("name", CONFIGS)


@cache
def network(config: LlamaConfig, dtype: str = "float32") -> LLaMa:
    """Random weights, biases included, and norms around 1; from numpy, which has nothing to compile."""
    random = np.random.default_rng(1)

    def values(path, leaf):
        around = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(around + 0.3 * random.standard_normal(leaf.shape), dtype)

    skeleton = jax.eval_shape(lambda: LLaMa(config, key=jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(values, skeleton)


@partial(jax.jit, static_argnames="from_empty")
def _forward(model, tokens, **options):
    return model(tokens, **options)


def forward(model: LLaMa, tokens, **options) -> tuple[np.ndarray, kvcache.KVCache | None]:
    """Logits on the host, where slicing them compiles nothing, and the cache."""
    logits, state = _forward(model, tokens, **options)
    return np.asarray(logits), state


def new_cache(config: LlamaConfig, rows: int, capacity: int = 16, dtype=jnp.float32) -> kvcache.KVCache:
    return kvcache.create(config.num_layers, rows, config.num_kv_heads, capacity, config.head_dim, dtype=dtype)


def tokens_of(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, PLAIN.vocab_size, shape, np.int32)


def assert_near(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


# Caches.

LENGTHS = np.array([9, 4, 12])


def decode(model, tokens, splits, from_empty):
    """Logits of a ragged batch read in pieces; only those of real tokens are filled in."""
    B, T = tokens.shape
    state, done = new_cache(model.config, B), np.zeros(B, int)
    logits = np.zeros((B, T, model.config.vocab_size), np.float32)
    for i, piece in enumerate(splits):
        count = np.clip(LENGTHS - done, 0, piece)
        chunk = np.zeros((B, piece), np.int32)
        for b in range(B):
            chunk[b, : count[b]] = tokens[b, done[b] : done[b] + count[b]]
        options = dict(lengths_B=count.astype(np.int32), cache=state)
        out, state = forward(model, chunk, from_empty=from_empty and i == 0, **options)
        for b in range(B):
            logits[b, done[b] : done[b] + count[b]] = out[b, : count[b]]
        done += count
        np.testing.assert_array_equal(state.length_B, done)
    assert (done == LENGTHS).all()
    return logits


@pytest.mark.parametrize(
    "name,splits,from_empty",
    [("plain", (12,), True), ("plain", (5, 7), False), ("window", (12,), False)]
    + [(name, *way) for name in CONFIGS for way in (((5, 5, 1, 1), True), ((1,) * 12, False))],
)
def test_reading_in_pieces_equals_reading_at_once(name, splits, from_empty):
    model, tokens = network(CONFIGS[name]), tokens_of(3, 12)
    full, nothing = forward(model, tokens)
    assert nothing is None
    got = decode(model, tokens, splits, from_empty)
    for b, length in enumerate(LENGTHS):
        assert_near(got[b, :length], full[b, :length])


def test_a_row_alone_equals_a_row_in_a_batch():
    """The single-row path of decoding, over a prompt of one token."""
    model, tokens = network(PLAIN), tokens_of(2, 6)
    full, _ = forward(model, tokens)
    state, got = new_cache(PLAIN, 1), []
    for t in range(6):
        out, state = forward(model, tokens[:1, t : t + 1], cache=state)
        got.append(out)
    assert_near(np.concatenate(got, 1), full[:1])


@pytest.mark.parametrize("from_empty", [False, True])
def test_an_empty_cache_is_not_looked_into(from_empty):
    """Scores have as many keys as there are tokens, not as the cache has slots, once it is known to be empty."""
    lowered = _forward.lower(network(PLAIN), tokens_of(1, 5), cache=new_cache(PLAIN, 1, 997), from_empty=from_empty)
    dots = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert any("997" in line for line in dots) != from_empty


def test_rows_can_be_cut_back_and_continued_otherwise():
    model, tokens, other = network(PLAIN), tokens_of(2, 8), tokens_of(2, 4, seed=1)
    _, state = forward(model, tokens, cache=new_cache(PLAIN, 2))
    state = kvcache.reset(state, length_B=jnp.array([3, 5]))
    got, _ = forward(model, other, cache=state)
    for b, kept in enumerate((3, 5)):
        whole = np.concatenate([tokens[b, :kept], other[b]])[None]
        assert_near(got[b], forward(model, whole)[0][0, kept:])


def test_a_cache_of_less_precision_is_written_and_read():
    model, tokens = network(PLAIN), tokens_of(2, 8)
    full, _ = forward(model, tokens)
    _, state = forward(model, tokens[:, :7], cache=new_cache(PLAIN, 2, dtype=jnp.bfloat16))
    assert state.k_LBKSH.dtype == jnp.bfloat16
    got, _ = forward(model, tokens[:, 7:], cache=state)
    assert_near(got, full[:, 7:], 0.05)


def test_segments_and_a_cache_are_refused_together():
    with pytest.raises(ValueError, match="segments_BT and a cache"):
        network(PLAIN)(tokens_of(1, 4), segments_BT=jnp.zeros((1, 4), int), cache=new_cache(PLAIN, 1))


# Padding and packing.


@every_config
def test_what_stands_behind_the_real_tokens_changes_nothing(name):
    model, lengths = network(CONFIGS[name]), np.array([9, 4, 12, 0], np.int32)
    tokens = tokens_of(4, 12)
    behind = np.arange(12) >= lengths[:, None]
    one, _ = forward(model, tokens, lengths_B=lengths)
    other, _ = forward(model, np.where(behind, tokens_of(4, 12, seed=1), tokens), lengths_B=lengths)
    assert np.isfinite(one).all() and np.isfinite(other).all()
    np.testing.assert_array_equal(np.where(behind[..., None], 0, one), np.where(behind[..., None], 0, other))
    alone, _ = forward(model, tokens[:1, :9])
    assert_near(one[:1, :9], alone)


def test_padding_does_not_stretch_dynamic_rope():
    """Six real tokens of a context of 8 in rows of 12."""
    config = replace(PLAIN, rope_scaling=DynamicScaling(factor=4.0, original_context=8))
    model, tokens = network(config), tokens_of(2, 12)
    alone, _ = forward(model, tokens[:, :6])
    padded, _ = forward(model, tokens, lengths_B=np.array([6, 12], np.int32))
    assert_near(padded[0, :6], alone[0])
    whole, _ = forward(model, tokens)
    assert_near(padded[1], whole[1])
    assert np.abs(whole[0, :6] - alone[0]).max() > 1e-3
    cached, _ = forward(model, tokens, lengths_B=np.array([6, 12], np.int32), cache=new_cache(config, 2))
    assert_near(cached[0, :6], alone[0])
    assert_near(cached[1], whole[1])


DOCUMENTS = (5, 1, 4, 2)
SEGMENTS = np.repeat(np.arange(4, dtype=np.int32), DOCUMENTS)[None]
POSITIONS = np.concatenate([np.arange(n, dtype=np.int32) for n in DOCUMENTS])[None]


@every_config
def test_packed_documents_equal_each_alone(name):
    model, tokens, lengths = network(CONFIGS[name]), tokens_of(1, 12), np.array(DOCUMENTS, np.int32)
    packed, _ = forward(model, tokens, segments_BT=SEGMENTS, positions_BT=POSITIONS)
    rows = np.zeros((len(DOCUMENTS), 5), np.int32)
    rows[np.arange(5) < lengths[:, None]] = tokens[0]
    alone, _ = forward(model, rows, lengths_B=lengths)
    for number, length in enumerate(DOCUMENTS):
        assert_near(packed[:, SEGMENTS[0] == number], alone[number : number + 1, :length])


@every_config
def test_only_distances_between_positions_count(name):
    model, tokens = network(CONFIGS[name]), tokens_of(1, 12)
    near, far = (forward(model, tokens, positions_BT=np.arange(start, start + 12)[None])[0] for start in (0, 7))
    assert_near(far, near)
    other, _ = forward(model, tokens, positions_BT=2 * np.arange(12)[None])
    assert np.abs(other - near).max() > 1e-3 * np.abs(near).max()


def influence(model, **options) -> np.ndarray:
    """[T, T]: gradient magnitude of the logits at t by the embedding of the token at s. All tokens differ."""
    tokens = jnp.arange(12)[None]
    weights = jnp.asarray(np.random.default_rng(2).standard_normal((12, model.config.vocab_size)), jnp.float32)

    def logits(embed_VD):
        changed = jax.tree.map(lambda x: x, model)
        changed.embed_VD = type(model.embed_VD)(embed_VD)
        return (changed(tokens, **options)[0][0] * weights).sum(-1)

    return np.abs(jax.jit(jax.jacrev(logits))(model.embed_VD[...])[:, :12]).sum(-1)


@pytest.mark.parametrize("name", ["plain", "qk-norm", "plain-mlp", "mixed-windows"])
def test_gradients_come_from_the_past_only(name):
    allowed = np.tril(np.ones((12, 12), bool))
    got = influence(network(CONFIGS[name]))
    assert (got[~allowed] == 0).all()
    assert (got[allowed] > 1e-6).all()


@pytest.mark.parametrize("name", ["plain", "mixed-windows"])
def test_no_gradient_crosses_packed_documents(name):
    allowed = np.tril(SEGMENTS.T == SEGMENTS)
    model = network(CONFIGS[name])
    got = influence(model, segments_BT=SEGMENTS, positions_BT=POSITIONS)
    assert (got[~allowed] == 0).all()
    near = np.subtract.outer(np.arange(12), np.arange(12)) < 3
    assert (got[allowed & near] > 1e-6).all()


def test_windows_limit_how_far_back_gradients_come_from():
    """Two layers with windows of 3 see 4 tokens back."""
    distance = np.subtract.outer(np.arange(12), np.arange(12))
    got = influence(network(CONFIGS["window"]))
    assert (got[(distance < 0) | (distance > 4)] == 0).all()
    assert (got[(distance >= 0) & (distance <= 4)] > 1e-6).all()


# Everything that is given is read.

FULL = replace(
    PLAIN, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True, rope_scaling=LLAMA_3, layer_windows=(None, 3)
)
PERTURBED = {
    "vocab_size": dict(vocab_size=41),
    "hidden_size": dict(hidden_size=18),
    "intermediate_size": dict(intermediate_size=25),
    "num_layers": dict(num_layers=3, layer_windows=(None, 3, None)),
    "num_heads": dict(num_heads=6),
    "num_kv_heads": dict(num_kv_heads=4),
    "head_dim": dict(head_dim=10),
    "max_position_embeddings": None,  # config_from_hf gives it to DynamicScaling, see below
    "rms_norm_eps": dict(rms_norm_eps=1e-2),
    "rope_theta": dict(rope_theta=90.0),
    "rope_scaling": dict(rope_scaling=None),
    "tie_embeddings": dict(tie_embeddings=True),
    "activation": dict(activation="gelu"),
    "gated": dict(gated=False),
    "qkv_bias": dict(qkv_bias=False),
    "out_bias": dict(out_bias=False),
    "mlp_bias": dict(mlp_bias=False),
    "qk_norm": dict(qk_norm=False),
    "layer_windows": dict(layer_windows=(None, 4)),
    "initializer_range": dict(initializer_range=0.31),
}


def fresh(config: LlamaConfig) -> LLaMa:
    """The network as it is initialised; not under jit, so that draws of one shape are compiled once for all tests."""
    return LLaMa(config, key=jax.random.key(0))


@cache
def unperturbed() -> LLaMa:
    return fresh(FULL)


def differ(one: LLaMa, other: LLaMa) -> bool:
    """Whether parameters or logits do."""
    ones, others = (
        {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(m)} for m in (one, other)
    )
    if {k: v.shape for k, v in ones.items()} != {k: v.shape for k, v in others.items()}:
        return True
    if any((np.asarray(ones[k]) != np.asarray(others[k])).any() for k in ones):
        return True
    logits = [forward(model, tokens_of(1, 12))[0] for model in (one, other)]
    return bool(np.abs(logits[0] - logits[1]).max() > 1e-5 * np.abs(logits[1]).max())


def test_every_field_has_a_perturbation():
    names = {field.name for field in dataclasses.fields(LlamaConfig)}
    assert names == PERTURBED.keys(), "give the new field an entry in PERTURBED that shows where it is read"


@pytest.mark.parametrize("field", [name for name, changes in PERTURBED.items() if changes])
def test_every_field_changes_parameters_or_logits(field):
    config = replace(FULL, **PERTURBED[field])
    changed = jax.eval_shape(lambda: fresh(config))
    if jax.tree.map(jnp.shape, jax.tree.leaves(changed)) == jax.tree.map(jnp.shape, jax.tree.leaves(unperturbed())):
        changed = fresh(config)
    assert differ(changed, unperturbed()), f"{field} is read nowhere"


def test_the_same_config_gives_the_same_network():
    assert not differ(fresh(replace(FULL)), unperturbed())


def test_max_position_embeddings_reaches_dynamic_rope():
    raw = dict(model_type="llama", vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    raw |= dict(num_attention_heads=2, rope_scaling=dict(rope_type="dynamic", factor=2.0))
    assert differ(*(network(config_from_hf(raw | dict(max_position_embeddings=n))) for n in (8, 9)))


SCALINGS = [LinearScaling(factor=2.0), DynamicScaling(factor=2.0, original_context=8), LLAMA_3, YARN]


@pytest.mark.parametrize(
    "scaling,field",
    [(s, f.name) for s in SCALINGS for f in dataclasses.fields(s)],
    ids=lambda x: getattr(x, "__name__", None) or (x if isinstance(x, str) else type(x).__name__),
)
def test_every_field_of_rope_scaling_changes_logits(scaling, field):
    config = replace(PLAIN, rope_scaling=scaling, rope_theta=1000.0, head_dim=16)
    value = getattr(scaling, field)
    changed = replace(scaling, **{field: not value if isinstance(value, bool) else value + 1})
    model, tokens = network(config), tokens_of(1, 12)
    old, new = (forward_with(model, replace(config, rope_scaling=s), tokens) for s in (scaling, changed))
    assert np.abs(old - new).max() > 1e-5 * np.abs(old).max()


def forward_with(model: LLaMa, config: LlamaConfig, tokens) -> np.ndarray:
    """Logits of the model's weights under another config of the same shapes."""
    return np.asarray(
        forward(jax.tree.unflatten(jax.tree.structure(network(config)), jax.tree.leaves(model)), tokens)[0]
    )


@pytest.mark.parametrize("config", [FULL, replace(FULL, tie_embeddings=True, gated=False)], ids=["full", "tied-plain"])
def test_every_parameter_is_read(config):
    def loss(model):
        logits, _ = model(tokens_of(1, 12))
        return (jax.nn.log_softmax(logits)[..., 0]).sum()

    grads = jax.jit(jax.grad(loss))(network(config))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        layers = np.abs(grad).reshape(config.num_layers, -1) if "blocks" in str(path) else np.abs(grad).reshape(1, -1)
        # A bias of all keys alike moves no softmax, but rotation makes it differ by position.
        assert (layers.max(axis=1) > 1e-6).all(), jax.tree_util.keystr(path)


# Its shape as a program and as a pytree.


def program(config: LlamaConfig) -> str:
    model = jax.eval_shape(lambda: LLaMa(config, key=jax.random.key(0)))
    state = jax.eval_shape(lambda: new_cache(config, 2))
    tokens = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    return jax.jit(lambda m, t, c: m(t, cache=c)).lower(model, tokens, state).as_text()


@pytest.mark.parametrize("windows", [(None,), (3,), (None, 3)])
def test_programs_do_not_grow_with_depth(windows):
    few, many = (program(replace(FULL, num_layers=n, layer_windows=(windows * n)[:n])) for n in (2, 8))
    assert few.count("\n") == many.count("\n")
    assert len(many) < 1.05 * len(few)


def test_hidden_states_and_unembedding_are_the_two_halves():
    model, tokens = network(PLAIN), tokens_of(2, 5)
    x_BTD, nothing = model.hidden(tokens)
    assert x_BTD.shape == (2, 5, 16) and nothing is None
    logits, _ = model(tokens)
    assert logits.dtype == jnp.float32
    assert_near(model.unembed(x_BTD[:, 2:4]), logits[:, 2:4])


def test_the_model_is_a_pytree():
    model, tokens = network(CONFIGS["mixed-windows"]), tokens_of(2, 5)
    want, _ = forward(model, tokens)
    leaves, structure = jax.tree.flatten(model)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    again = jax.tree.unflatten(structure, leaves)
    assert again.config == model.config
    np.testing.assert_array_equal(forward(again, tokens)[0], want)

    def loss(m):
        return jax.nn.logsumexp(m(tokens)[0]).sum()

    grads = jax.jit(jax.grad(loss))(model)
    assert jax.tree.structure(grads) == structure
    stepped = jax.tree.map(lambda p, g: p - 1e-3 * g, model, grads)
    assert isinstance(stepped, LLaMa)
    assert jax.jit(loss)(stepped) < jax.jit(loss)(model)
    np.testing.assert_array_equal(forward(model, tokens)[0], want)


def test_initial_weights():
    model = jax.jit(lambda key: LLaMa(replace(FULL, hidden_size=64, intermediate_size=256), key=key))(jax.random.key(3))
    block = model.blocks
    for matrix in (model.embed_VD, model.unembed_DV, block.q_DNH, block.o_NHD, block.gate_DF, block.down_FD):
        assert np.std(matrix[...]) == pytest.approx(0.3, rel=0.05)
        assert np.mean(matrix[...]) == pytest.approx(0, abs=0.02)
    assert not np.array_equal(block.up_DF[0], block.up_DF[1]), "layers begin alike"
    assert not np.array_equal(block.up_DF[...], block.gate_DF[...])
    assert (block.attn_norm_D[...] == 1).all() and (model.norm_D[...] == 1).all() and (block.k_norm_H[...] == 1).all()
    assert not block.q_bias_NH[...].any() and not block.down_bias_D[...].any()


@every_config
def test_bfloat16_stays_bfloat16_and_close(name):
    config, tokens = CONFIGS[name], tokens_of(2, 12)
    model = network(config, "bfloat16")
    (x_BTD, state), (logits, _) = jax.jit(lambda m, t, c: (m.hidden(t, cache=c), m(t, cache=c)))(
        model, tokens, new_cache(config, 2, dtype=jnp.bfloat16)
    )
    assert x_BTD.dtype == state.k_LBKSH.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    want, _ = forward(network(config), tokens)
    assert_near(logits, want, 0.06)


def test_the_implementation_reaches_attention():
    for implementation, reason in (("splash", "multiples of 128"), ("cudnn", "float32"), ("other", "'other'")):
        with pytest.raises(ValueError, match=reason):
            network(PLAIN)(tokens_of(1, 4), implementation=implementation)
    with pytest.raises(ValueError, match="window known when compiling"):
        network(CONFIGS["mixed-windows"])(tokens_of(1, 128), implementation="splash")


# For training: what is stored, and dropout.


@partial(jax.jit, static_argnames=("remat", "dropout_rate"))
def loss_and_gradients(model, tokens, **options):
    def loss(model):
        x_BTD, _ = model.hidden(tokens, **options)
        return jax.nn.logsumexp(model.unembed(x_BTD), axis=-1).sum()

    return jax.value_and_grad(loss)(model)


def assert_same_gradients(got, want):
    assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-6)
    for one, other in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        assert_near(one, other)


DEEP = replace(PLAIN, num_layers=6, layer_windows=(None, 3) * 3)


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_what_is_stored_changes_no_gradient(remat):
    """Computed again, dropout is the same again."""
    options = dict(dropout_rate=0.3, key=jax.random.key(4))
    got, want = (loss_and_gradients(network(DEEP), tokens_of(2, 12), remat=way, **options) for way in (remat, "none"))
    assert_same_gradients(got, want)


def test_each_way_stores_less_than_the_one_before():
    config = replace(
        PLAIN, num_layers=16, layer_windows=(None,) * 16, hidden_size=32, intermediate_size=128, head_dim=16
    )
    model = jax.eval_shape(lambda: LLaMa(config, key=jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    one = 2 * 128 * 32 * 4  # bytes of x_BTD

    def stored_bytes(remat):
        def pull(model, tokens):
            return jax.vjp(lambda model: model.hidden(tokens, remat=remat)[0], model)[1]

        leaves = jax.tree.leaves(jax.eval_shape(pull, model, tokens))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    # Of each layer, in units of x_BTD: its input; queries and attention 2 each, keys, values and attention's output;
    # gate and up 4 each; and with "none" norms, rotations and activations too.
    none, dots, block, everything = (stored_bytes(remat) for remat in ("none", "dots", "block", "everything"))
    assert none > dots + 16 * 8 * one
    assert dots > block + 16 * 14 * one
    assert block > everything + 11 * one

    def temp_bytes(remat):
        return loss_and_gradients.lower(model, tokens, remat=remat).compile().memory_analysis().temp_size_in_bytes

    none, dots, block = (temp_bytes(remat) for remat in ("none", "dots", "block"))
    assert none > dots + 16 * 4 * one
    assert dots > block + 16 * 12 * one


def test_stored_attention_is_not_computed_again():
    """With "dots" the backward pass finds attention's output: its softmax is gone through as often as with "none"."""

    def exps(remat):
        program = jax.make_jaxpr(partial(loss_and_gradients.__wrapped__, remat=remat))(network(PLAIN), tokens_of(1, 8))
        return str(program).count(" exp ")

    assert exps("none") == exps("dots") < exps("block")


def test_unknown_remat_is_refused():
    with pytest.raises(ValueError, match="remat 'all' is none of none, dots, block, everything"):
        network(PLAIN).hidden(tokens_of(1, 4), remat="all")


@jax.jit
def _noisy(model, tokens, key):
    return model.hidden(tokens, dropout_rate=0.3, key=key)[0]


def test_dropout_is_of_the_embeddings_and_what_each_layer_adds():
    """A network that adds up digits: 10000 of the embeddings, 1, 10, 100 and 1000 of its four sublayers' biases."""
    config = replace(PLAIN, out_bias=True, mlp_bias=True, rms_norm_eps=1e14)
    model = jax.tree.map(jnp.zeros_like, network(config))
    model.embed_VD = type(model.embed_VD)(jnp.full_like(model.embed_VD[...], 1e4))
    model.norm_D = type(model.norm_D)(jnp.full_like(model.norm_D[...], 1e7))
    per_layer = jnp.array([[1.0], [10.0]]) * jnp.ones((2, 16))
    model.blocks.o_bias_D = type(model.norm_D)(per_layer)
    model.blocks.down_bias_D = type(model.norm_D)(100 * per_layer)

    def digits(key):
        total = np.rint(np.asarray(_noisy(model, tokens_of(16, 32), key)) * 0.7).astype(int)
        return np.stack([total // 10**n % 10 for n in range(5)])

    kept = digits(jax.random.key(0))
    assert set(np.unique(kept)) == {0, 1}
    np.testing.assert_allclose(kept.reshape(5, -1).mean(1), 0.7, atol=0.02)
    for axis in (1, 2, 3):
        assert kept.mean(axis=axis).std() < 0.15, "whole rows, positions or components are dropped together"
    for one, other in [(i, j) for i in range(5) for j in range(i)]:
        agreement = (kept[one] == kept[other]).mean()
        assert agreement == pytest.approx(0.7**2 + 0.3**2, abs=0.03), (one, other)
    np.testing.assert_array_equal(digits(jax.random.key(0)), kept)
    assert (digits(jax.random.key(1)) == kept).mean() == pytest.approx(0.58, abs=0.03)


def test_dropout_needs_a_key_and_a_rate():
    model, tokens = network(PLAIN), tokens_of(2, 12)
    want, _ = jax.jit(lambda m, t: m.hidden(t))(model, tokens)
    np.testing.assert_array_equal(_noisy(model, tokens, None), want)
    np.testing.assert_array_equal(
        jax.jit(lambda m, t, k: m.hidden(t, key=k)[0])(model, tokens, jax.random.key(0)), want
    )
    assert np.abs(_noisy(model, tokens, jax.random.key(0)) - want).max() > 0.1
