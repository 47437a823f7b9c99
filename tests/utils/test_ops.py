"""Array functions against numpy in float64 and against torch."""

from functools import partial
from math import erf

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utils.ops import ACTIVATIONS, add_bias, attend, contract, feed_forward, rms_norm, rotate

# Largest error, relative to the largest magnitude of the result.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 3e-3}
DTYPES = tuple(TOLERANCE)

jit_contract = jax.jit(contract, static_argnames=("spec", "dtype"))
jit_attend = jax.jit(attend)


def normal(seed: int, *shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def exact(x: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def assert_near(got: jax.Array, want: np.ndarray, dtype: str) -> None:
    assert got.dtype == dtype
    assert got.shape == want.shape
    np.testing.assert_allclose(exact(got), want, rtol=0, atol=TOLERANCE[dtype] * np.abs(want).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", ["BTD,DF->BTF", "BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,VD->BTV"])
def test_contract(spec, dtype):
    size = dict(B=2, T=3, D=8, F=5, N=2, H=4, V=7)
    shapes = [[size[letter] for letter in part] for part in spec.partition("->")[0].split(",")]
    x, weight = normal(0, *shapes[0], dtype=dtype), normal(1, *shapes[1], dtype=dtype)
    assert_near(jit_contract(spec, x, weight), np.einsum(spec, exact(x), exact(weight)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", ["BTD,DF->BTF", "BTD,VD->BTV"])
def test_contract_of_a_single_row_is_the_same_row(spec, dtype):
    x = normal(0, 1, 2, 8, dtype=dtype)
    weight = normal(1, *((8, 5) if "DF" in spec else (5, 8)), dtype=dtype)
    both, one = jit_contract(spec, x, weight), jit_contract(spec, x[:, :1], weight)
    assert one.shape == (1, 1, 5)
    assert_near(one, exact(both)[:, :1], dtype)


def test_contract_of_a_single_row_is_a_matrix_times_a_vector():
    """XLA on CPU streams a weight at memory speed only in this form."""
    text = jax.jit(lambda x, w: contract("BTD,DF->BTF", x, w)).lower(normal(0, 1, 1, 8), normal(1, 8, 5)).as_text()
    dot = next(line for line in text.splitlines() if "dot_general" in line)
    assert "tensor<8xf32>" in dot, dot


def test_contract_can_widen_its_result():
    x, weight = normal(0, 2, 3, 64, dtype="bfloat16"), normal(1, 64, 5, dtype="bfloat16")
    want = np.einsum("BTD,DF->BTF", exact(x), exact(weight))
    assert_near(jit_contract("BTD,DF->BTF", x, weight, dtype=jnp.float32), want, "float32")
    assert_near(jit_contract("BTD,DF->BTF", x[:1, :1], weight, dtype=jnp.float32), want[:1, :1], "float32")


@pytest.mark.parametrize("eps", [1e-6, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 16), (2, 3, 4, 8)])
def test_rms_norm(shape, dtype, eps):
    x, scale = normal(0, *shape, dtype=dtype), normal(1, shape[-1], dtype=dtype)
    want = exact(x) / np.sqrt((exact(x) ** 2).mean(-1, keepdims=True) + eps) * exact(scale)
    assert_near(jax.jit(rms_norm)(x, scale, eps=eps), want, dtype)


def test_rms_norm_statistics_do_not_overflow_in_half_precision():
    x = jnp.full((1, 1, 8), 6e4, jnp.float16)
    assert_near(rms_norm(x, jnp.ones(8, jnp.float16), eps=1e-5), np.ones((1, 1, 8)), "float16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate_turns_each_pair_as_a_complex_number(dtype):
    x, angle = normal(0, 2, 3, 4, 6, dtype=dtype), normal(1, 2, 3, 3)
    first, second = np.split(exact(x), 2, axis=-1)
    turned = (first + 1j * second) * np.exp(1j * exact(angle))[:, :, None]
    got = jax.jit(rotate)(x, jnp.cos(angle), jnp.sin(angle))
    assert_near(got, np.concatenate([turned.real, turned.imag], -1), dtype)


def slow_attention(q, k, v, allowed, scale):
    """One query head, one query, at a time."""
    B, T, N, _ = q.shape
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(B, T, N):
        kv = n // (N // k.shape[2])
        readable = np.flatnonzero(allowed[b % len(allowed), t])
        score = scale * k[b, readable, kv] @ q[b, t, n]
        weight = np.exp(score - score.max())
        out[b, t, n] = weight / weight.sum() @ v[b, readable, kv]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("mask_rows", [1, 3])
def test_attend(kv_heads, mask_rows, dtype):
    q = normal(0, 3, 5, 4, 8, dtype=dtype)
    k, v = normal(1, 3, 7, kv_heads, 8, dtype=dtype), normal(2, 3, 7, kv_heads, 8, dtype=dtype)
    allowed = np.random.default_rng(3).random((mask_rows, 5, 7)) < 0.5
    allowed[:, :, 0] = True
    want = slow_attention(exact(q), exact(k), exact(v), allowed, 8**-0.5)
    assert_near(jit_attend(q, k, v, allowed), want, dtype)


def test_attend_takes_a_scale():
    q, k, v = (normal(i, 1, 3, 2, 4) for i in range(3))
    allowed = jnp.ones((1, 3, 3), bool)
    want = slow_attention(exact(q), exact(k), exact(v), np.asarray(allowed), 0.1)
    assert_near(jit_attend(q, k, v, allowed, scale=0.1), want, "float32")


def test_attend_scores_are_float32_in_half_precision():
    """Scores near 300 that differ by 1 are one number in bfloat16."""
    q = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    k = jnp.array([[75, 75, 75, 75], [75.5, 75, 75, 75.5]], jnp.bfloat16).reshape(1, 2, 1, 4)
    v = jnp.array([0, 1], jnp.bfloat16).reshape(1, 2, 1, 1) * jnp.ones(4, jnp.bfloat16)
    out = jit_attend(q, k, v, jnp.ones((1, 1, 2), bool), scale=1.0)
    np.testing.assert_allclose(exact(out), 1 / (1 + np.exp(-1)), atol=4e-3)


def test_attend_where_nothing_may_be_read_is_the_mean():
    q, k, v = (normal(i, 1, 2, 2, 4) for i in range(3))
    allowed = jnp.array([[[False, False], [True, False]]])
    out = jit_attend(q, k, v, allowed)
    assert_near(out[:, 0], exact(v).mean(1), "float32")
    grads = jax.jit(jax.grad(lambda *qkv: attend(*qkv, allowed).sum(), argnums=(0, 1, 2)))(q, k, v)
    assert all(np.isfinite(g).all() for g in grads)


def test_attend_wants_heads_to_share_evenly():
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        attend(normal(0, 1, 2, 3, 4), normal(1, 1, 2, 2, 4), normal(2, 1, 2, 2, 4), jnp.ones((1, 2, 2), bool))


ACTIVATIONS_64 = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_formula(name):
    x = jnp.linspace(-6, 6, 101)
    assert_near(ACTIVATIONS[name](x), ACTIVATIONS_64[name](exact(x)), "float32")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_equals_torch(name):
    torch = pytest.importorskip("torch")
    functions = {
        "silu": torch.nn.functional.silu,
        "relu": torch.nn.functional.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    assert_near(ACTIVATIONS[name](x), functions[name](torch.from_numpy(x)).double().numpy(), "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward(gated, biased, dtype):
    x, gate, up, down = (normal(i, *s, dtype=dtype) for i, s in enumerate([(2, 3, 8), (8, 6), (8, 6), (6, 8)]))
    biases = [normal(9 + i, n, dtype=dtype) for i, n in enumerate((6, 6, 8))] if biased else [None] * 3
    run = jax.jit(partial(feed_forward, activation="silu"))
    got = run(x, up, down, gate_DF=gate if gated else None, biases=tuple(biases))
    zero = [0 if bias is None else exact(bias) for bias in biases]
    act = ACTIVATIONS_64["silu"]
    raised = exact(x) @ exact(up) + zero[1]
    inner = act(exact(x) @ exact(gate) + zero[0]) * raised if gated else act(raised)
    assert_near(got, inner @ exact(down) + zero[2], dtype)


def test_add_bias():
    x = normal(0, 2, 3)
    assert add_bias(x, None) is x
    np.testing.assert_array_equal(add_bias(x, jnp.ones(3)), x + 1)
