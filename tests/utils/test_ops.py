"""Array functions against numpy in float64 and against torch."""

from functools import partial
from math import erf

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utils.ops import ACTIVATIONS, LowRank, add_bias, attend, contract, dropout, embed, feed_forward, rms_norm, rotate

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


# Every product of the network with a weight.
SPECS = (
    *("BTD,DNH->BTNH", "BTD,DKH->BTKH", "BTNH,NHD->BTD", "BTD,DF->BTF", "BTF,FD->BTD", "BTD,DV->BTV", "BTD,VD->BTV"),
    *("BTD,DR->BTR", "BTNH,NHR->BTR", "BTR,RNH->BTNH"),
)
# The gradient of a weight goes two ways, by which of input and output is the larger.
SIZES = {
    "wide-input": dict(B=2, T=3, D=9, F=5, N=2, K=2, H=4, V=7, R=3),
    "wide-output": dict(B=2, T=3, D=5, F=9, N=3, K=3, H=4, V=11, R=13),
    "single-row": dict(B=1, T=1, D=8, F=5, N=2, K=1, H=4, V=7, R=3),
}


def operands(spec: str, size: dict[str, int], dtype: str = "float32") -> list[jax.Array]:
    """Input, weight, and a cotangent of the result."""
    inputs, result = spec.split("->")
    parts = (*inputs.split(","), result)
    return [normal(i, *(size[letter] for letter in part), dtype=dtype) for i, part in enumerate(parts)]


def contract_gradients(spec, x, weight, dout, **options):
    return jax.jit(lambda *xw: jax.vjp(lambda x, w: contract(spec, x, w, **options), *xw)[1](dout))(x, weight)


def exact_gradients(spec, x, weight, dout):
    inputs, result = spec.split("->")
    x_letters, weight_letters = inputs.split(",")
    x, weight, dout = exact(x), exact(weight), exact(dout)
    return (
        np.einsum(f"{result},{weight_letters}->{x_letters}", dout, weight),
        np.einsum(f"{result},{x_letters}->{weight_letters}", dout, x),
    )


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("spec", SPECS)
def test_contract_gradients(spec, sizes):
    arrays = operands(spec, SIZES[sizes])
    for got, want in zip(contract_gradients(spec, *arrays), exact_gradients(spec, *arrays)):
        assert_near(got, want, "float32")


@pytest.mark.parametrize("sizes", ["wide-input", "wide-output"])
@pytest.mark.parametrize("spec", SPECS)
def test_contract_gradients_turn_the_smaller_operand(spec, sizes):
    """The weight's gradient is one product over B and T, then at most a transposition, kept apart by a barrier."""
    x, weight, dout = operands(spec, SIZES[sizes])
    program = str(jax.make_jaxpr(lambda *xw: jax.vjp(partial(contract, spec), *xw)[1](dout)[1])(x, weight))
    weight_letters, result = spec.partition("->")[0].split(",")[1], spec.partition("->")[2]
    inner = spec.partition(",")[0].replace("BT", "")
    first = inner if x.size <= dout.size else result.replace("BT", "")
    assert ("optimization_barrier" in program) == (not weight_letters.startswith(first))


@pytest.mark.parametrize("spec", ["BTD,DF->BTF", "BTD,VD->BTV"])
@pytest.mark.parametrize("sizes", SIZES)
def test_contract_gradients_in_half_precision(spec, sizes):
    x, weight, dout = operands(spec, SIZES[sizes], "bfloat16")
    for wide in (None, jnp.float32):
        cotangent = dout if wide is None else dout.astype(wide)
        got = contract_gradients(spec, x, weight, cotangent, dtype=wide)
        for one, want in zip(got, exact_gradients(spec, x, weight, dout)):
            assert_near(one, want, "bfloat16")


def low_rank(spec, size, **options) -> tuple[jax.Array, LowRank, jax.Array]:
    x, base, dout = operands(spec, size)
    inner = spec.partition(",")[0].replace("BT", "")
    outer = spec.partition("->")[2].replace("BT", "")
    a, b = (normal(8 + i, *(size[x] for x in part)) for i, part in enumerate((f"{inner}R", f"R{outer}")))
    return x, LowRank(base=base, a=a, b=b, scale=0.7, **options), dout


def as_one_weight(spec: str, weight: LowRank) -> jax.Array:
    """The sum that the adapter stands for."""
    x_letters, weight_letters = spec.partition("->")[0].split(",")
    inner, outer = x_letters.replace("BT", ""), spec.partition("->")[2].replace("BT", "")
    change = jnp.einsum(f"{inner}R,R{outer}->{weight_letters}", weight.a, weight.b, precision="highest")
    return weight.base + weight.scale * change


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("spec", SPECS[:7])
def test_low_rank_weight_is_the_sum_it_stands_for(spec, sizes):
    x, weight, dout = low_rank(spec, SIZES[sizes], dropout=0.5)

    def ours(x, weight):
        return contract(spec, x, weight)

    def plain(x, weight):
        return jnp.einsum(spec, x, as_one_weight(spec, weight), precision="highest")

    (got, got_grads), (want, want_grads) = (
        jax.jit(lambda *args, f=f: (f(*args), jax.vjp(f, *args)[1](dout)))(x, weight) for f in (ours, plain)
    )
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    for one, other in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def test_low_rank_factors_may_be_wider_than_the_activations():
    x, weight, _ = low_rank("BTD,DF->BTF", SIZES["wide-input"])
    half = LowRank(base=weight.base.astype("bfloat16"), a=weight.a, b=weight.b, scale=weight.scale)
    got = contract("BTD,DF->BTF", x.astype("bfloat16"), half)
    assert_near(got, exact(jnp.einsum("BTD,DF->BTF", x, as_one_weight("BTD,DF->BTF", weight))), "bfloat16")
    assert contract("BTD,DF->BTF", x.astype("bfloat16"), half, dtype=jnp.float32).dtype == jnp.float32


def test_low_rank_dropout_is_of_the_adapter_alone():
    spec, key = "BTD,DF->BTF", jax.random.key(3)
    x, weight, _ = low_rank(spec, SIZES["wide-input"], dropout=0.5, key=key)
    change = contract(spec, dropout(x, 0.5, key), as_one_weight(spec, weight) - weight.base)
    got = jax.jit(partial(contract, spec))(x, weight)
    assert_near(got, exact(contract(spec, x, weight.base) + change), "float32")
    silent = LowRank(base=weight.base, a=weight.a, b=weight.b, scale=weight.scale, dropout=0.5)
    assert np.abs(got - contract(spec, x, silent)).max() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rate", [0.1, 0.75])
def test_dropout_zeroes_its_share_and_keeps_the_mean(rate, dtype):
    x = normal(0, 200, 500, dtype=dtype)
    got = jax.jit(dropout, static_argnums=1)(x, rate, jax.random.key(0))
    kept = np.asarray(got) != 0
    assert kept.mean() == pytest.approx(1 - rate, abs=0.01)
    assert kept.mean(0).std() < 0.1 and kept.mean(1).std() < 0.1, "whole rows or columns are dropped together"
    assert_near(got, np.where(kept, exact(x) / (1 - rate), 0), dtype)
    grad = jax.grad(lambda x: dropout(x, rate, jax.random.key(0)).astype(jnp.float32).sum())(x)
    drawn = np.asarray(x) != 0
    np.testing.assert_array_equal((np.asarray(grad) != 0)[drawn], kept[drawn])


def test_dropout_without_a_key_or_a_rate_is_nothing():
    x = normal(0, 2, 3)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_that_are_sums_over_many_places_are_as_exact_as_others(dtype):
    """Of a token, a bias and a norm's scale at 8192 places; summed in half precision they would be far off."""
    B, T, D = 8, 1024, 32
    tokens_BT, x_BTD = jnp.ones((B, T), jnp.int32), jnp.ones((B, T, D), dtype)
    cotangent_BTD = jnp.abs(normal(0, B, T, D, dtype=dtype)) / 64
    sums_D = exact(cotangent_BTD).sum((0, 1))
    cases = {
        "embed": (lambda w: embed(tokens_BT, w), jnp.ones((2, D), dtype), [0 * sums_D, sums_D]),
        "bias": (lambda w: add_bias(x_BTD, w), jnp.ones(D, dtype), sums_D),
        "norm": (lambda w: rms_norm(x_BTD, w, eps=0), jnp.ones(D, dtype), sums_D),
    }
    for name, (function, weight, want) in cases.items():
        [got] = jax.jit(lambda w, c, function=function: jax.vjp(function, w)[1](c))(weight, cotangent_BTD)
        assert got.dtype == dtype
        np.testing.assert_allclose(exact(got), want, rtol=TOLERANCE[dtype], err_msg=name)
