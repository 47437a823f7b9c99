"""The variants of policy-gradient losses: what the ratio of a token is, and what of tokens becomes the loss.

Letters and signs as in `trainers.policy_losses`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from trainers.trainer import Loss
from utils.shapes import Array


class Tokens(NamedTuple):
    """What a loss is made of. The ratio is [B, T], or [B, 1] where a completion has one for all its tokens.

    `factor_BT` multiplies the objective of a token, `penalty_BT` is added to its loss; tokens outside the mask are in
    neither. Ratios are clipped to clip_low … clip_high, and bounded by `delta` where that is a number. `max_completion`
    and `rollout_tokens_B` as in `policy_loss`.
    """

    logprobs_BT: Array
    ratio_BT: Array
    advantages_B1: Array
    factor_BT: Array
    penalty_BT: Array
    mask_BT: Array
    clip_low: float
    clip_high: float
    delta: float | None
    max_completion: int
    rollout_tokens_B: Array | None


# What the ratio of a token is: functions of the log-probabilities, of now and of old, and the mask, to log(r).


def token_importance(logprobs_BT: Array, old_BT: Array, mask_BT: Array) -> Array:
    """The token's own, π / π_old; [B, T]. Source: GRPO, arXiv:2402.03300, eq. 3."""
    return logprobs_BT - old_BT


def sequence_importance(logprobs_BT: Array, old_BT: Array, mask_BT: Array) -> Array:
    """The geometric mean over the active tokens, the same for all of them; [B, 1]. Source: GSPO,
    arXiv:2507.18071, eq. 7.

    With the loss `grpo` this is GSPO's objective, eq. 5. With the others a completion counts as often as it has tokens.
    """
    total_B1 = jnp.sum((logprobs_BT - old_BT) * mask_BT, axis=1, keepdims=True)
    return total_B1 / jnp.maximum(jnp.sum(mask_BT, axis=1, keepdims=True), 1)


def sequence_token_importance(logprobs_BT: Array, old_BT: Array, mask_BT: Array) -> Array:
    """[s] π / [π], where s is the geometric mean; [B, T]. Source: GSPO-token, arXiv:2507.18071, eq. 14.

    The loss is that of "sequence"; so is its gradient with the loss `grpo`, unless tokens differ in weight: each has
    that of its own log-probability alone.
    """
    s_B1 = jax.lax.stop_gradient(sequence_importance(logprobs_BT, old_BT, mask_BT))
    return s_B1 + logprobs_BT - jax.lax.stop_gradient(logprobs_BT)


IMPORTANCE: dict[str, Callable[[Array, Array, Array], Array]] = {
    "token": token_importance,
    "sequence": sequence_importance,
    "sequence_token": sequence_token_importance,
}


# The losses. Below, l_it is the loss of a token: -f min(r A, clip(r) A) + beta KL, but for cispo.


def grpo(tokens: Tokens) -> Loss:
    """Mean over completions of each one's token mean: 1/B Σ_i 1/|o_i| Σ_t l_it. Source: arXiv:2402.03300, eq. 3.

    Weight: the rows. As in TRL a completion without active tokens, such as a truncated one that is masked, counts.
    """
    loss_BT, metrics = _clipped(tokens)
    lengths_B = jnp.maximum(jnp.sum(tokens.mask_BT, axis=1), 1)
    return Loss(jnp.sum(jnp.sum(loss_BT, axis=1) / lengths_B), _rows(tokens), metrics)


def bnpo(tokens: Tokens) -> Loss:
    """Mean over the active tokens of the update: Σ_i Σ_t l_it / Σ_i |o_i|, i over the batch of one update.

    Weight: the active tokens. The name is TRL's, for a normalisation by batch; TRL takes means of micro-batches and
    averages them, this is the mean over all of them at once. The Beta normalisation of rewards in arXiv:2506.02864,
    called BNPO as well, is something else.
    """
    loss_BT, metrics = _clipped(tokens)
    return Loss(jnp.sum(loss_BT), jnp.sum(tokens.mask_BT), metrics)


def dr_grpo(tokens: Tokens) -> Loss:
    """Sum over tokens by a constant: Σ_i Σ_t l_it / (B M), M the largest length of a completion.

    Source: arXiv:2503.20783, sec. 3.2, whose constant is the generation budget. Weight: B M, also of masked rows.
    """
    loss_BT, metrics = _clipped(tokens)
    return Loss(jnp.sum(loss_BT), _rows(tokens) * tokens.max_completion, metrics)


def dapo(tokens: Tokens) -> Loss:
    """Mean over the active tokens of the rollout: Σ_i Σ_t l_it / Σ_i |o_i|. Source: arXiv:2503.14476, eq. 8 and 12.

    Weight: the active tokens. Where several updates share a rollout, those of the whole rollout by the share of its
    completions that the update has (as in TRL): a token then weighs the same in each of them, while in `bnpo` it weighs
    more in an update of short completions. Where an update takes all of a rollout, the two are the same.
    """
    loss_BT, metrics = _clipped(tokens)
    return Loss(jnp.sum(loss_BT), _rollout_tokens(tokens), metrics)


def cispo(tokens: Tokens) -> Loss:
    """Clipped weights instead of a clipped objective: l_it = -f [min(r, 1 + epsilon_high)] A log π + beta KL.

    Source: arXiv:2506.13585, eq. 4 and 5, without the lower bound, which the paper does not use. Normalised as `dapo`.
    `epsilon` is of no account but as the default of epsilon_high. TRL's epsilon_high is the bound itself, 1 +
    epsilon_high here; its metric `cispo_clip_ratio` is the share of tokens above it whose advantage is positive.
    """
    bounded_BT = jax.lax.stop_gradient(jnp.minimum(tokens.ratio_BT, tokens.clip_high))
    objective_BT = bounded_BT * tokens.advantages_B1 * tokens.logprobs_BT
    clipped_BT = (tokens.ratio_BT > tokens.clip_high) & (tokens.advantages_B1 > 0)
    metrics = {"cispo_clip_ratio": _mean(clipped_BT, tokens)}
    return Loss(jnp.sum(_token_loss(objective_BT, tokens)), _rollout_tokens(tokens), metrics)


LOSSES: dict[str, Callable[[Tokens], Loss]] = {
    "grpo": grpo,
    "bnpo": bnpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "cispo": cispo,
}


def _clipped(tokens: Tokens) -> tuple[Array, dict[str, tuple[Array, Array]]]:
    """-f min(min(r, delta) A, clip(r) A) + beta KL, and which tokens are clipped (each completion as one if it has one
    ratio)."""
    ratio_BT, advantages_B1 = tokens.ratio_BT, tokens.advantages_B1
    low, high = tokens.clip_low, tokens.clip_high
    bounded_BT = ratio_BT if tokens.delta is None else jnp.minimum(ratio_BT, tokens.delta)
    objective_BT = jnp.minimum(bounded_BT * advantages_B1, jnp.clip(ratio_BT, low, high) * advantages_B1)
    low_BT = (ratio_BT < low) & (advantages_B1 < 0)
    high_BT = (ratio_BT > high) & (advantages_B1 > 0)
    shares = {"low_mean": low_BT, "high_mean": high_BT, "region_mean": low_BT | high_BT}
    metrics = {f"clip_ratio/{name}": _mean(clipped_BT, tokens) for name, clipped_BT in shares.items()}
    return _token_loss(objective_BT, tokens), metrics


def _token_loss(objective_BT: Array, tokens: Tokens) -> Array:
    return (tokens.penalty_BT - tokens.factor_BT * objective_BT) * tokens.mask_BT


def _mean(happens_BT: Array, tokens: Tokens) -> tuple[Array, Array]:
    """Over active tokens, or over completions where they have one value each."""
    mask_BT = tokens.mask_BT if happens_BT.shape == tokens.mask_BT.shape else jnp.ones_like(tokens.mask_BT[:, :1])
    return jnp.sum(happens_BT * mask_BT), jnp.sum(mask_BT)


def _rows(tokens: Tokens) -> Array:
    return jnp.float32(tokens.mask_BT.shape[0])


def _rollout_tokens(tokens: Tokens) -> Array:
    return jnp.sum(tokens.mask_BT) if tokens.rollout_tokens_B is None else jnp.sum(tokens.rollout_tokens_B)
