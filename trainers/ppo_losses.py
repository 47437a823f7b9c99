"""Proximal policy optimisation with a critic: rewards of tokens, advantages, and the loss of an update.

Letters here: B completions, one for each row, T their tokens. π is the policy that is trained, π_old the one that the
completions were drawn from, ref the reference; V are the critic's values: V_t is of the state that token t is drawn in,
before it is there. Log-probabilities are in nats, of the token at their place.

Tokens outside a mask, such as what a tool said in the middle of a completion, or padding, may have any values. What is
made once for a rollout is numpy on the host, in float64 inside; the loss is for jax.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from trainers.policy_losses import HIGHEST_LOG, bounded_exp
from trainers.trainer import Loss
from utils.shapes import Array, Bool, Float

_LEAST_STD = 1e-8  # added to what is divided by


@dataclass(frozen=True, kw_only=True)
class PPOLossConfig:
    """Ratios are clipped to 1 ± `epsilon`, values to `value_epsilon` around those of the rollout, None: not at all.

    `vf_coef` weighs the loss of the values. Raises ValueError for values out of range.
    """

    epsilon: float = 0.2
    value_epsilon: float | None = 0.2
    vf_coef: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= 1:
            raise ValueError(f"epsilon {self.epsilon} must be above 0 and at most 1")
        if self.value_epsilon is not None and not 0 < self.value_epsilon < math.inf:
            raise ValueError(f"value_epsilon {self.value_epsilon} must be above 0 and finite, or null for no clipping")
        if not 0 < self.vf_coef < math.inf:
            raise ValueError(f"vf_coef {self.vf_coef} must be above 0 and finite: without it no value is learnt")


def k1(log_BT: np.ndarray) -> np.ndarray:
    """log(π / ref) of log(ref / π): without bias, of either sign. Source: http://joschu.net/blog/kl-approx.html."""
    return -log_BT


def k3(log_BT: np.ndarray) -> np.ndarray:
    """ref / π - 1 - log(ref / π): without bias, never negative. Source: as `k1`."""
    log_BT = np.minimum(log_BT, HIGHEST_LOG)
    return np.expm1(log_BT) - log_BT


# How the divergence from the reference is estimated at each token: functions of log(ref / π).
ESTIMATORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"k1": k1, "k3": k3}


def token_rewards(
    scores_B: Float[Array, "B"],
    logprobs_BT: Float[Array, "B T"],
    reference_logprobs_BT: Float[Array, "B T"],
    mask_BT: Bool[Array, "B T"] | Float[Array, "B T"],
    *,
    kl_coef: float,
    estimator: Literal["k1", "k3"] = "k1",
) -> Float[Array, "B T"]:
    """-kl_coef KL of each active token, and at the last one the completion's score as well; float32, 0 elsewhere.

    Source: arXiv:1909.08593, eq. 2, and arXiv:2203.02155, eq. 2, both with k1.
    """
    active_BT = np.asarray(mask_BT) != 0
    log_BT = np.where(active_BT, np.asarray(reference_logprobs_BT, np.float64) - np.asarray(logprobs_BT), 0)
    rewards_BT = np.where(active_BT, -kl_coef * ESTIMATORS[estimator](log_BT), 0)
    rows_B = np.flatnonzero(active_BT.any(axis=1))
    last_B = active_BT.shape[1] - 1 - np.argmax(active_BT[:, ::-1], axis=1)
    rewards_BT[rows_B, last_B[rows_B]] += np.asarray(scores_B, np.float64)[rows_B]
    return rewards_BT.astype(np.float32)


def gae(
    rewards_BT: Float[Array, "B T"],
    values_BT: Float[Array, "B T"],
    mask_BT: Bool[Array, "B T"] | Float[Array, "B T"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Advantages, and returns, which are advantages + values; float32, 0 outside the mask.

    A_t = δ_t + gamma lam A_t', where δ_t = r_t + gamma V_t' - V_t and t' is the next active token, however many masked
    ones stand between: they are as if they were not there. Behind the last one there is nothing: V and A are 0.
    Source: arXiv:1506.02438, eq. 16.
    """
    active_BT = np.asarray(mask_BT) != 0
    rewards_BT = np.where(active_BT, np.asarray(rewards_BT, np.float64), 0)
    values_BT = np.where(active_BT, np.asarray(values_BT, np.float64), 0)
    advantages_BT = np.zeros_like(values_BT)
    next_value_B = next_advantage_B = np.zeros(len(values_BT))
    for t in reversed(range(values_BT.shape[1])):
        active_B = active_BT[:, t]
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantages_BT[:, t] = np.where(active_B, delta_B + gamma * lam * next_advantage_B, 0)
        next_value_B = np.where(active_B, values_BT[:, t], next_value_B)
        next_advantage_B = np.where(active_B, advantages_BT[:, t], next_advantage_B)
    return advantages_BT.astype(np.float32), (advantages_BT + values_BT).astype(np.float32)


def whiten(values_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"] | Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Active values less their mean, divided by their standard deviation (by n) + 1e-8; float32, 0 outside the mask.

    To be taken over a rollout, not over a part of it.
    """
    active_BT = np.asarray(mask_BT) != 0
    values_BT = np.where(active_BT, np.asarray(values_BT, np.float64), 0)
    count = max(int(active_BT.sum()), 1)
    centred_BT = np.where(active_BT, values_BT - values_BT.sum() / count, 0)
    std = math.sqrt((centred_BT**2).sum() / count)
    return (centred_BT / (std + _LEAST_STD)).astype(np.float32)


def explained_variance(
    values_BT: Float[Array, "B T"], returns_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"] | Float[Array, "B T"]
) -> float:
    """1 - Var(returns - values) / Var(returns) over active tokens: 1 is a perfect critic, 0 one that knows the mean.

    NaN where the returns are all the same.
    """
    active_BT = np.asarray(mask_BT) != 0
    returns_N, values_N = (np.asarray(x_BT, np.float64)[active_BT] for x_BT in (returns_BT, values_BT))
    variance = returns_N.var() if returns_N.size else 0.0
    return float(1 - (returns_N - values_N).var() / variance) if variance > 0 else math.nan


def ppo_loss(
    logprobs_BT: Float[Array, "B T"],
    values_BT: Float[Array, "B T"],
    *,
    old_logprobs_BT: Float[Array, "B T"],
    old_values_BT: Float[Array, "B T"],
    advantages_BT: Float[Array, "B T"],
    returns_BT: Float[Array, "B T"],
    mask_BT: Bool[Array, "B T"] | Float[Array, "B T"],
    entropy_BT: Float[Array, "B T"],
    config: PPOLossConfig,
) -> Loss:
    """The loss of policy and critic: the sum over active tokens of both, and their number as the weight.

    A token has -min(r A, clip(r, 1 ± epsilon) A), r = π / π_old (arXiv:1707.06347, eq. 7), and vf_coef times
    0.5 max((V - R)², (clip(V, V_old ± value_epsilon) - R)²) (https://github.com/openai/baselines, ppo2). Only
    `logprobs_BT` and `values_BT` have gradients. A log(r) above 20 is taken to be 20, without gradient.

    Metrics have TRL's names but for val/, which is value/ or policy/ here; `policy/approxkl_avg` is log(r)² / 2, the
    share of clipped tokens of policy and values counts those for which clipping changes the loss.
    """
    active_BT = mask_BT != 0

    def known(x_BT: Array) -> Array:
        return jax.lax.stop_gradient(jnp.where(active_BT, x_BT, 0))

    logprobs_BT, values_BT = (jnp.where(active_BT, x_BT, 0) for x_BT in (logprobs_BT, values_BT))
    log_BT = logprobs_BT - known(old_logprobs_BT)
    ratio_BT = bounded_exp(log_BT)
    policy_BT, clipped_BT = _policy_loss(ratio_BT, known(advantages_BT), config.epsilon)
    value_BT, bounded_BT = _value_loss(values_BT, known(old_values_BT), known(returns_BT), config.value_epsilon)
    mask_BT = active_BT.astype(jnp.float32)
    weight = jnp.sum(mask_BT)
    observed = {
        "loss/policy_avg": policy_BT,
        "loss/value_avg": value_BT,
        "policy/approxkl_avg": 0.5 * log_BT**2,
        "policy/clipfrac_avg": clipped_BT,
        "policy/entropy_avg": known(entropy_BT),
        "policy/ratio": ratio_BT,
        "value/clipfrac_avg": bounded_BT,
        "value/mean": values_BT,
    }
    metrics = {name: (jnp.sum(x_BT * mask_BT), weight) for name, x_BT in observed.items()}
    total = jnp.sum((policy_BT + config.vf_coef * value_BT) * mask_BT)
    return Loss(total, weight, jax.lax.stop_gradient(metrics))


def _policy_loss(ratio_BT: Array, advantages_BT: Array, epsilon: float) -> tuple[Array, Array]:
    """-min(r A, clip(r) A), and where clipping lowers the objective."""
    free_BT, clipped_BT = ratio_BT * advantages_BT, jnp.clip(ratio_BT, 1 - epsilon, 1 + epsilon) * advantages_BT
    return -jnp.minimum(free_BT, clipped_BT), clipped_BT < free_BT


def _value_loss(values_BT: Array, old_BT: Array, returns_BT: Array, limit: float | None) -> tuple[Array, Array]:
    """0.5 max((V - R)², (clip(V) - R)²), and where clipping raises the error."""
    near_BT = values_BT if limit is None else jnp.clip(values_BT, old_BT - limit, old_BT + limit)
    error_BT, near_error_BT = (values_BT - returns_BT) ** 2, (near_BT - returns_BT) ** 2
    return 0.5 * jnp.maximum(error_BT, near_error_BT), near_error_BT > error_BT
