"""Rotary frequencies and angles against `transformers`, and against the formulas in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utils.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
    rope_angles,
    rope_frequencies,
    yarn_attention_factor,
)

LLAMA_3_1 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA_3_2 = dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0)


def yarn(**changes) -> YarnScaling:
    values = dict(factor=4.0, original_context=32, beta_fast=32.0, beta_slow=1.0, attention_factor=1.0, truncate=True)
    return YarnScaling(**(values | changes))


def plain64(head_dim: int, base: float) -> np.ndarray:
    return np.array([base ** (-2 * p / head_dim) for p in range(head_dim // 2)])


def llama3_64(head_dim: int, base: float, scaling: Llama3Scaling) -> np.ndarray:
    """By wavelengths, one at a time, as Meta describes it."""
    longest, shortest = (scaling.original_context / f for f in (scaling.low_freq_factor, scaling.high_freq_factor))
    result = []
    for frequency in plain64(head_dim, base):
        wavelength = 2 * math.pi / frequency
        if wavelength < shortest:
            result.append(frequency)
        elif wavelength > longest:
            result.append(frequency / scaling.factor)
        else:
            smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            result.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
    return np.array(result)


def yarn_64(head_dim: int, base: float, scaling: YarnScaling) -> np.ndarray:
    """One dimension at a time."""

    def dimension(turns):
        return head_dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    result = []
    for p, frequency in enumerate(plain64(head_dim, base)):
        divided = min(max((p - low) / (high - low), 0), 1)
        result.append(frequency * (1 - divided) + frequency / scaling.factor * divided)
    return np.array(result)


@pytest.mark.parametrize("head_dim,base", [(8, 10000.0), (64, 500000.0), (128, 1e6)])
def test_plain_frequencies(head_dim, base):
    got = rope_frequencies(head_dim, base=base)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, plain64(head_dim, base), rtol=1e-6)


def test_linear_frequencies():
    np.testing.assert_allclose(
        rope_frequencies(16, base=1e4, scaling=LinearScaling(factor=2.5)), plain64(16, 1e4) / 2.5, rtol=1e-6
    )


def test_dynamic_frequencies_within_the_context_are_plain():
    scaling = DynamicScaling(factor=4.0, original_context=32)
    np.testing.assert_array_equal(rope_frequencies(16, base=1e4, scaling=scaling), rope_frequencies(16, base=1e4))


@pytest.mark.parametrize("head_dim,parameters", [(128, LLAMA_3_1), (64, LLAMA_3_2)])
def test_llama3_frequencies(head_dim, parameters):
    scaling = Llama3Scaling(**parameters, original_context=8192)
    got = rope_frequencies(head_dim, base=500000.0, scaling=scaling)
    np.testing.assert_allclose(got, llama3_64(head_dim, 500000.0, scaling), rtol=2e-6)
    ratio = plain64(head_dim, 500000.0) / got
    assert ratio[0] == pytest.approx(1) and ratio[-1] == pytest.approx(parameters["factor"])
    assert ((ratio > 1.01) & (ratio < parameters["factor"] - 0.01)).any(), "nothing was blended"


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    "head_dim,base,context,fast",
    [
        (128, 1e6, 32768, 32.0),
        (16, 1e4, 32, 32.0),  # begins in front of the first dimension
        (64, 150000.0, 4096, 32.0),
        (16, 100.0, 4096, 32.0),  # ends behind the last pair
        (16, 20.0, 4096, 400.0),  # ends behind the last dimension
    ],
)
def test_yarn_frequencies(head_dim, base, context, fast, truncate):
    scaling = yarn(original_context=context, beta_fast=fast, truncate=truncate)
    got = rope_frequencies(head_dim, base=base, scaling=scaling)
    np.testing.assert_allclose(got, yarn_64(head_dim, base, scaling), rtol=2e-6)


def test_yarn_ramp_without_width():
    """Both ends in one dimension: it is kept, those behind it are divided."""
    context = 26  # a little more than 4 turns of the first pair
    scaling = yarn(original_context=context, beta_fast=4.0, beta_slow=4.0, truncate=False)
    got = rope_frequencies(16, base=1e4, scaling=scaling)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[1:], plain64(16, 1e4)[1:] / 4, rtol=2e-6)


@pytest.mark.parametrize(
    "arguments,want",
    [
        ((4.0,), 0.1 * math.log(4) + 1),
        ((1.0,), 1.0),
        ((40.0, 0.707, 1.0), (0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1)),
        ((40.0, 1.0, 1.0), 1.0),
        ((40.0, 2.0, None), 0.1 * math.log(40) + 1),
    ],
)
def test_yarn_attention_factor(arguments, want):
    assert yarn_attention_factor(*arguments) == pytest.approx(want, rel=1e-12)


def test_odd_head_size_is_refused():
    with pytest.raises(ValueError, match="7"):
        rope_frequencies(7, base=1e4)


def test_angles_are_position_times_frequency():
    positions = np.array([[0, 1, 2, 5], [9, 8, 7, 1000]])
    cos, sin = rope_angles(jnp.array(positions), 8, base=1e4)
    angle = positions[..., None] * plain64(8, 1e4)
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(cos, np.cos(angle), atol=1e-4)
    np.testing.assert_allclose(sin, np.sin(angle), atol=1e-4)


def test_yarn_scales_both_sine_and_cosine():
    positions = jnp.arange(6)[None]
    plain = rope_angles(positions, 8, base=1e4, scaling=yarn())
    warm = rope_angles(positions, 8, base=1e4, scaling=yarn(attention_factor=1.25))
    for a, b in zip(plain, warm):
        np.testing.assert_allclose(1.25 * a, b, rtol=1e-6)


def dynamic64(length: int, head_dim: int = 8, base: float = 1e4, factor: float = 4.0, context: int = 16) -> np.ndarray:
    stretch = factor * max(length, context) / context - (factor - 1)
    return plain64(head_dim, base * stretch ** (head_dim / (head_dim - 2)))


@pytest.mark.parametrize("given", [False, True])
def test_dynamic_growth_is_row_by_row(given):
    """Rows of 10, 16, 17 and 40 tokens; the first two are within the context of 16."""
    lengths = np.array([10, 16, 17, 40])
    positions = np.minimum(np.arange(40)[None], lengths[:, None] - 1)
    scaling = DynamicScaling(factor=4.0, original_context=16)
    length_B = jnp.array(lengths) if given else None
    cos, sin = rope_angles(jnp.array(positions), 8, base=1e4, scaling=scaling, length_B=length_B)
    for row, length in enumerate(lengths):
        angle = positions[row][:, None] * dynamic64(length)
        np.testing.assert_allclose(cos[row], np.cos(angle), atol=1e-5)
        np.testing.assert_allclose(sin[row], np.sin(angle), atol=1e-5)


def test_given_length_counts_and_not_the_positions():
    scaling = DynamicScaling(factor=4.0, original_context=16)
    cos, _ = rope_angles(jnp.arange(4)[None], 8, base=1e4, scaling=scaling, length_B=jnp.array([33]))
    np.testing.assert_allclose(cos[0], np.cos(np.arange(4)[:, None] * dynamic64(33)), atol=1e-5)


def test_angles_can_be_traced():
    scaling = DynamicScaling(factor=4.0, original_context=16)
    positions = jnp.arange(20)[None]
    for value in (None, scaling, yarn(), LinearScaling(factor=2.0)):
        eager = rope_angles(positions, 8, base=1e4, scaling=value)
        traced = jax.jit(lambda p, s=value: rope_angles(p, 8, base=1e4, scaling=s))(positions)
        np.testing.assert_allclose(eager, traced, atol=2e-6)


HF_CASES = {
    "linear": (dict(factor=3.0), LinearScaling(factor=3.0), None),
    "dynamic-within": (dict(factor=3.0), DynamicScaling(factor=3.0, original_context=64), 50),
    "dynamic-beyond": (dict(factor=3.0), DynamicScaling(factor=3.0, original_context=64), 200),
    "llama3": (
        dict(**LLAMA_3_1, original_max_position_embeddings=8192),
        Llama3Scaling(**LLAMA_3_1, original_context=8192),
        None,
    ),
    "yarn": (
        dict(factor=4.0, original_max_position_embeddings=32),
        yarn(attention_factor=yarn_attention_factor(4.0)),
        None,
    ),
    "yarn-mscale": (
        dict(factor=40.0, original_max_position_embeddings=64, mscale=0.707, mscale_all_dim=1.0, beta_fast=16.0),
        yarn(
            factor=40.0, original_context=64, beta_fast=16.0, attention_factor=yarn_attention_factor(40.0, 0.707, 1.0)
        ),
        None,
    ),
    "yarn-untruncated": (
        dict(factor=4.0, original_max_position_embeddings=32, attention_factor=1.5, truncate=False, beta_slow=2.0),
        yarn(attention_factor=1.5, truncate=False, beta_slow=2.0),
        None,
    ),
}


@pytest.mark.parametrize("case", HF_CASES)
def test_angles_equal_those_of_transformers(case):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters, scaling, length = HF_CASES[case]
    kind = case.partition("-")[0]
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=64,
        rope_parameters={"rope_type": kind, "rope_theta": 20000.0, **parameters},
    )
    inverse, magnitude = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    positions = jnp.arange(12)[None]
    length_B = None if length is None else jnp.array([length])
    cos, sin = rope_angles(positions, 16, base=20000.0, scaling=scaling, length_B=length_B)
    angle = np.arange(12)[:, None] * inverse.double().numpy()
    np.testing.assert_allclose(cos[0], np.cos(angle) * magnitude, atol=3e-6)
    np.testing.assert_allclose(sin[0], np.sin(angle) * magnitude, atol=3e-6)


BAD_NUMBERS = (0, -1.0, math.nan, math.inf, True, None, "2", [2.0])
BAD_CONTEXTS = (0, -1, 2.0, True, None, "8")
DYNAMIC = DynamicScaling(factor=2.0, original_context=8)
STRETCHED = Llama3Scaling(**LLAMA_3_1, original_context=8)


@pytest.mark.parametrize(
    "scaling,field,values",
    [
        (LinearScaling(factor=2.0), "factor", BAD_NUMBERS),
        (DYNAMIC, "factor", BAD_NUMBERS),
        (DYNAMIC, "original_context", BAD_CONTEXTS),
        (STRETCHED, "factor", BAD_NUMBERS),
        (STRETCHED, "original_context", BAD_CONTEXTS),
        (STRETCHED, "low_freq_factor", (4.0, math.nan, math.inf, None, True)),
        (STRETCHED, "high_freq_factor", (1.0, math.nan, math.inf, "4", True)),
        (yarn(), "factor", BAD_NUMBERS),
        (yarn(), "original_context", BAD_CONTEXTS),
        (yarn(), "beta_fast", BAD_NUMBERS),
        (yarn(), "beta_slow", BAD_NUMBERS),
        (yarn(), "attention_factor", BAD_NUMBERS),
        (yarn(), "truncate", (None, 1, "false")),
    ],
)
def test_senseless_scalings_are_refused(scaling, field, values):
    for value in values:
        with pytest.raises(ValueError, match=field) as caught:
            dataclasses.replace(scaling, **{field: value})
        assert repr(value) in str(caught.value)


def test_a_factor_below_one_is_allowed():
    assert LinearScaling(factor=0.5).factor == 0.5
