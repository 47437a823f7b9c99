"""How far a student's predictions are from a teacher's, over a large vocabulary: neither one's logits are ever whole.

Letters as in `utils.ops`; C are the positions of a chunk, E is the teacher's model axis. P is the teacher's
distribution, Q the student's, both softmax(logits / temperature).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from trainers.vocabulary import (
    Cut,
    count_chunks,
    gather,
    gradients_of,
    in_chunks,
    join,
    logits_of,
    on_own_tokens_of,
    scatter,
)
from utils.log_probs import are_tokens, logits_of_tokens, softmax_parts, sum_over
from utils.platforms import target_platform
from utils.shapes import Array, Float, Int


@dataclass(frozen=True, kw_only=True)
class DistillationLossConfig:
    """(1 - hard_weight) temperature^2 D(P, Q) + hard_weight times the cross-entropy of the targets at temperature 1.

    `kind` is D: forward_kl is KL(P || Q), reverse_kl is KL(Q || P), jsd is
    beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q. jsd / beta goes to forward_kl as beta goes
    to 0, and jsd / (1 - beta) to reverse_kl as it goes to 1. `beta` is for jsd alone, by default 0.5.

    Sources: arXiv:1503.02531, sec. 2 (temperature, its square, the mixture); arXiv:2306.13649, eq. 1 and 2 (jsd).
    """

    kind: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    temperature: float = 1.0
    beta: float | None = None
    hard_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCES:
            raise ValueError(f"kind {self.kind!r} is none of {', '.join(DIVERGENCES)}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0 and finite, not {self.temperature}")
        if not 0 <= self.hard_weight <= 1:
            raise ValueError(f"hard_weight {self.hard_weight} must be from 0 to 1")
        if self.beta is None:
            return
        if self.kind != "jsd":
            raise ValueError(f"beta {self.beta} is for kind jsd, not for {self.kind}")
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta {self.beta} must be above 0 and below 1; forward_kl and reverse_kl are what lies at its ends"
            )


class Distillation(NamedTuple):
    """Sums over all positions, each times its weight; float32 scalars, in nats but for `correct`, a count.

    `loss` is what is minimised; `divergence` is D alone, at the temperature and without its square; `nll` the
    student's negative log-likelihood of the targets, `entropy` that of its distribution, both at temperature 1;
    `correct` counts targets that no other token beats.
    """

    loss: Array
    divergence: Array
    nll: Array
    correct: Array
    entropy: Array


def distillation(
    x_BTD: Float[Array, "B T D"],
    unembedding: tuple[str, Array],
    teacher_x_BTE: Float[Array, "B T E"],
    teacher_unembedding: tuple[str, Array],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    config: DistillationLossConfig | None = None,
    chunk_logits: int | None = None,
) -> Distillation:
    """The distillation loss of hidden states of both networks, summed over positions with their weights.

    An unembedding is an output matrix and its letters, DV or VD. Targets without weight may be any number. About
    `chunk_logits` logits, of both networks together, are in memory at once.

    Only `loss` has a gradient, towards x_BTD and the student's output matrix: both are computed along with the loss
    itself, while a chunk's logits are at hand, so that there are four products with the vocabulary. Softmax and sums
    are float32. Raises ValueError where the vocabularies are of different sizes.
    """
    config, matrices = config or DistillationLossConfig(), (unembedding, teacher_unembedding)
    student_V, teacher_V = (weight.shape[letters.index("V")] for letters, weight in matrices)
    if student_V != teacher_V:
        raise ValueError(f"the student's vocabulary of {student_V} tokens is not the teacher's of {teacher_V}")
    targets_BT = jnp.where(weights_BT == 0, 0, targets_BT)  # so that they may be anything, such as -100
    letters = tuple(letters for letters, _ in matrices)

    def own(cuts: tuple[Cut, Cut], weights: tuple[Array, Array], *arrays_BT: Array) -> tuple[Array, ...]:
        B, T, _ = arrays_BT[0].shape
        num_chunks = count_chunks(B, T, 2 * weights[0].shape[letters[0].index("V")], chunk_logits)
        return _distillation(_Options(letters, num_chunks, config, cuts), *weights, *arrays_BT)

    sums = on_own_tokens_of(own, matrices, x_BTD, teacher_x_BTE, targets_BT, weights_BT, summed=True)
    return Distillation(*sums)


class _Options(NamedTuple):
    """Letters and cut of the student's output matrix, then of the teacher's."""

    letters: tuple[str, str]
    num_chunks: int
    config: DistillationLossConfig
    cuts: tuple[Cut, Cut]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _distillation(options: _Options, weight: Array, teacher_weight: Array, *arrays_BT: Array):
    """Arrays are the hidden states of student and teacher, targets and weights."""
    matrices = _gathered(options, weight, teacher_weight)

    def chunk(sums, inputs):
        return jax.tree.map(jnp.add, sums, _chunk_sums(options, matrices, *inputs)[0]), None

    return jax.lax.scan(chunk, _zeros(), in_chunks(options.num_chunks, *arrays_BT))[0]


def _forward(options: _Options, weight: Array, teacher_weight: Array, *arrays_BT: Array):
    """The sums, and the gradients of the loss for a cotangent of 1."""

    # In float16 small gradients would vanish before the loss scale, which comes with the cotangent, can lift them.
    x_BTD, cut = arrays_BT[0], options.cuts[0]
    half = x_BTD.dtype == jnp.float16
    factor, kept = (2.0**8, jnp.float32) if half else (1.0, x_BTD.dtype)
    matrices = _gathered(options, weight, teacher_weight)

    def chunk(carry, inputs):
        sums, dweight = carry
        new, dlogits_BCV = _chunk_sums(options, matrices, *inputs)
        dx_BCD, more = gradients_of(options.letters[0], inputs[0], matrices[0], dlogits_BCV * factor, kept)
        return (jax.tree.map(jnp.add, sums, new), dweight + more), dx_BCD

    carry = (_zeros(), jnp.zeros(matrices[0].shape, jnp.float32))
    (sums, dweight), dx_XBCD = jax.lax.scan(chunk, carry, in_chunks(options.num_chunks, *arrays_BT))
    dx_BTD = join(dx_XBCD, x_BTD.shape[1])
    dweight = scatter(dweight if half else dweight.astype(weight.dtype), cut)
    if half:
        dx_BTD, dweight = dx_BTD / factor, dweight / factor
    if target_platform() != "cpu":  # else the whole gradient may stay until the layers' backward pass is over
        dx_BTD, dweight = jax.lax.optimization_barrier((dx_BTD, dweight))
    return sums, (dx_BTD, dweight, x_BTD[:0], weight[:0])


def _backward(options: _Options, saved: tuple[Array, ...], cotangents: tuple[Array, ...]):
    dx_BTD, dweight, x, weight = saved  # gradients of what this device's part of the vocabulary adds
    dloss = sum_over(cotangents[0], options.cuts[0].words)
    return (dweight * dloss).astype(weight.dtype), None, (dx_BTD * dloss).astype(x.dtype), None, None, None


_distillation.defvjp(_forward, _backward)


def _gathered(options: _Options, *weights: Array) -> tuple[Array, ...]:
    return tuple(gather(weight, cut) for weight, cut in zip(weights, options.cuts))


def _zeros() -> tuple[Array, ...]:
    return (jnp.float32(0),) * len(Distillation._fields)


def _chunk_sums(
    options: _Options,
    matrices: tuple[Array, Array],
    x_BCD: Array,
    teacher_x_BCE: Array,
    targets_BC: Array,
    weights_BC: Array,
):
    """Sums of a chunk, and the gradient of its loss by the student's logits, float32 [B, C, V]."""
    config, axis, heat = options.config, options.cuts[0].words, options.config.temperature
    logits_BCV = logits_of(options.letters[0], x_BCD, matrices[0])
    log_p_BCV, _ = _log_softmax(logits_of(options.letters[1], teacher_x_BCE, matrices[1]) / heat, axis)
    plain_BCV, top_BC = _log_softmax(logits_BCV, axis)
    log_q_BCV = plain_BCV if heat == 1 else _log_softmax(logits_BCV / heat, axis)[0]
    beta = 0.5 if config.beta is None else config.beta
    divergence_BC, slope_BCV = DIVERGENCES[config.kind](log_p_BCV, log_q_BCV, beta, axis)

    target_BC, chances_BCV = logits_of_tokens(plain_BCV, targets_BC, axis), jnp.exp(plain_BCV)
    hard, soft = config.hard_weight, 1 - config.hard_weight
    each_BC = (
        soft * heat**2 * divergence_BC - hard * target_BC,
        divergence_BC,
        -target_BC,
        (target_BC >= top_BC).astype(jnp.float32),
        -_sum(chances_BCV * plain_BCV, axis),
    )
    dlogits_BCV = soft * heat * slope_BCV
    if hard:
        is_target_BCV = are_tokens(plain_BCV.shape[-1], targets_BC, axis)
        dlogits_BCV += hard * (chances_BCV - is_target_BCV)
    return tuple(jnp.sum(own_BC * weights_BC) for own_BC in each_BC), dlogits_BCV * weights_BC[..., None]


def _log_softmax(logits_BCV: Array, axis: str | None) -> tuple[Array, Array]:
    """Log-probabilities, and [B, C] that of the likeliest token."""
    top_BC1, _, total_BC1 = softmax_parts(logits_BCV, axis)
    return (logits_BCV - top_BC1) - jnp.log(total_BC1), -jnp.log(total_BC1)[..., 0]


def _sum(x_BCV: Array, axis: str | None) -> Array:
    return sum_over(jnp.sum(x_BCV, axis=-1), axis)


# Each of log P, log Q [B, C, V], beta and the mesh axis of the vocabulary: D [B, C], and its gradient by log Q before
# it is normalised, which is by the student's logits over the temperature, [B, C, V].


def _forward_kl(log_p_BCV: Array, log_q_BCV: Array, _: float, axis: str | None) -> tuple[Array, Array]:
    p_BCV = jnp.exp(log_p_BCV)
    return _sum(p_BCV * (log_p_BCV - log_q_BCV), axis), jnp.exp(log_q_BCV) - p_BCV


def _reverse_kl(log_p_BCV: Array, log_q_BCV: Array, _: float, axis: str | None) -> tuple[Array, Array]:
    q_BCV, ratio_BCV = jnp.exp(log_q_BCV), log_q_BCV - log_p_BCV
    divergence_BC = _sum(q_BCV * ratio_BCV, axis)
    return divergence_BC, q_BCV * (ratio_BCV - divergence_BC[..., None])


def _jsd(log_p_BCV: Array, log_q_BCV: Array, beta: float, axis: str | None) -> tuple[Array, Array]:
    p_BCV, q_BCV = jnp.exp(log_p_BCV), jnp.exp(log_q_BCV)
    log_m_BCV = jnp.logaddexp(log_p_BCV + math.log(beta), log_q_BCV + math.log1p(-beta))
    ratio_BCV = log_q_BCV - log_m_BCV
    from_q_BC = _sum(q_BCV * ratio_BCV, axis)
    divergence_BC = beta * _sum(p_BCV * (log_p_BCV - log_m_BCV), axis) + (1 - beta) * from_q_BC
    return divergence_BC, (1 - beta) * q_BCV * (ratio_BCV - from_q_BC[..., None])


DIVERGENCES: dict[str, Callable[[Array, Array, float, str | None], tuple[Array, Array]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
}
