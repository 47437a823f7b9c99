"""Rotary frequencies and angles, with the ways in use of stretching them past the trained context.

Letters as in `utils.ops`; P counts rotary pairs, H / 2. Frequencies and angles are float32 whatever the network's
dtype.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from utils.shapes import Array, Float, Int


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions are divided by `factor`. Source: arXiv:2306.15595."""

    factor: float

    def __post_init__(self) -> None:
        _check_positive(self, "factor")


@dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """NTK-aware base that grows with the text once it is longer than the trained context.

    For n tokens, n > original_context: base * (factor * n / original_context - (factor - 1)) ** (H / (H - 2)).
    Each row of a batch uses its own n. Keys already in a cache keep the rotation they were written with, as in
    `transformers`. Source: https://www.reddit.com/r/LocalLLaMA/comments/14mrgpr; arXiv:2309.00071, app. A.
    """

    factor: float
    original_context: int

    def __post_init__(self) -> None:
        _check_positive(self, "factor")
        _check_context(self.original_context)


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended.

    `low_freq_factor` and `high_freq_factor` count turns within `original_context` tokens.
    Source: https://github.com/meta-llama/llama-models, models/llama3/reference_impl/model.py.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self) -> None:
        _check_positive(self, "factor")
        _check_context(self.original_context)
        low, high = self.low_freq_factor, self.high_freq_factor
        if not (is_finite(low) and is_finite(high)) or low == high:
            raise ValueError(
                f"low_freq_factor and high_freq_factor must be two different finite numbers, not {low!r} and {high!r}"
            )


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Blend of kept and divided frequencies over a ramp of dimensions, with warmer attention.

    `beta_fast` and `beta_slow` are the turns within `original_context` tokens at the ends of the ramp; `truncate`
    rounds those ends outwards to whole dimensions. `attention_factor` multiplies cos and sin (so attention scores by
    its square). Source: arXiv:2309.00071, eq. 17-22.
    """

    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool

    def __post_init__(self) -> None:
        _check_positive(self, "factor", "beta_fast", "beta_slow", "attention_factor")
        _check_context(self.original_context)
        if not isinstance(self.truncate, bool):
            raise ValueError(f"truncate must be true or false, not {self.truncate!r}")


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling


def is_finite(value: object) -> bool:
    """Whether a value is a number, no truth value, and neither infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def rope_angles(
    positions_BT: Int[Array, "B T"],
    head_dim: int,
    *,
    base: float,
    scaling: RopeScaling | None = None,
    length_B: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B T P"], Float[Array, "B T P"]]:
    """Cosines and sines, each float32 [B, T, P], of the rotary angles at integer positions.

    `length_B` is the number of tokens in each row's whole text so far, which DynamicScaling alone looks at; by
    default the largest position plus one. Source: arXiv:2104.09864, eq. 15.
    """
    if isinstance(scaling, DynamicScaling):
        length_B = jnp.max(positions_BT, axis=-1) + 1 if length_B is None else length_B
        frequency = _dynamic_frequencies(head_dim, base, scaling, length_B)[:, None, :]
    else:
        frequency = rope_frequencies(head_dim, base=base, scaling=scaling)
    angle_BTP = positions_BT.astype(jnp.float32)[..., None] * frequency
    magnitude = scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0
    return jnp.cos(angle_BTP) * magnitude, jnp.sin(angle_BTP) * magnitude


def rope_frequencies(head_dim: int, *, base: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians per position of each rotary pair, float32 [P]; DynamicScaling counts as within its context.

    Raises ValueError for an odd head size.
    """
    if head_dim % 2:
        raise ValueError(f"rotary embedding needs an even head size, not {head_dim}")
    frequency_P = 1.0 / base ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    match scaling:
        case None | DynamicScaling():
            return frequency_P.astype(np.float32)
        case LinearScaling():
            return (frequency_P / scaling.factor).astype(np.float32)
        case Llama3Scaling():
            kept_P = _llama3_kept_share(frequency_P, scaling)
        case YarnScaling():
            kept_P = _yarn_kept_share(head_dim, base, scaling)
    return (frequency_P * kept_P + frequency_P / scaling.factor * (1 - kept_P)).astype(np.float32)


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """The attention factor of a YaRN checkpoint that does not state one. Source: arXiv:2309.00071, eq. 22.

    With both `mscale` numbers (DeepSeek's variant) it is the ratio of the two magnitudes.
    """

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return magnitude(mscale) / magnitude(mscale_all_dim)
    return magnitude(1.0)


def _check_positive(scaling: RopeScaling, *names: str) -> None:
    for name in names:
        value = getattr(scaling, name)
        if not is_finite(value) or value <= 0:
            raise ValueError(f"{name} must be a positive finite number, not {value!r}")


def _check_context(context: int) -> None:
    if not isinstance(context, int) or isinstance(context, bool) or context < 1:
        raise ValueError(f"original_context must be a positive whole number, not {context!r}")


def _dynamic_frequencies(head_dim: int, base: float, scaling: DynamicScaling, length_B: Array) -> Array:
    """frequency_BP of each row for its length."""
    length_B = jnp.maximum(length_B, scaling.original_context).astype(jnp.float32)
    stretch_B = scaling.factor * length_B / scaling.original_context - (scaling.factor - 1)
    base_B = base * stretch_B ** (head_dim / (head_dim - 2))
    exponent_P = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return 1.0 / base_B[:, None] ** exponent_P


def _llama3_kept_share(frequency_P: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """How much of each frequency stays as it was: 1 for short wavelengths, 0 for long ones."""
    turns_P = scaling.original_context * frequency_P / (2 * math.pi)
    ramp_P = (turns_P - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return np.clip(ramp_P, 0, 1)


def _yarn_kept_share(head_dim: int, base: float, scaling: YarnScaling) -> np.ndarray:
    """How much of each frequency stays as it was: 1 in the first (fast) dimensions, 0 in the last."""

    def dimension_with_turns(turns: float) -> float:
        return head_dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension_with_turns(scaling.beta_fast), dimension_with_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    pairs_P = np.arange(head_dim // 2, dtype=np.float32)
    return 1 - np.clip((pairs_P - low) / width, 0, 1)
