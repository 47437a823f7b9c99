"""Policy-gradient losses of sampled completions, chosen by name: GRPO and its kin.

Letters here: B completions, one for each row, T their tokens. π is the policy that is trained, π_old the one that the
step began with, μ the sampler, ref the reference; r_it = π / π_old of token t of completion i, A_i its advantage, |o_i|
the number of its active tokens, those that the mask counts. Log-probabilities are float32, in nats, of the token at
their place. [x] is x without gradient.

All that is summed here is a sum over rows, so that micro-batches, devices and the order of rows change no loss, unlike
in TRL, where means of micro-batches are averaged.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from trainers.policy_variants import IMPORTANCE, LOSSES, Tokens
from trainers.trainer import Loss
from utils.shapes import Array, Bool, Float

HIGHEST_LOG = 20.0  # of a ratio, of which e^20 is as good as infinite; above it there is no gradient


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """Which loss, of `LOSSES`, and its options.

    `importance` says what the ratio of a token is, one of `IMPORTANCE`. Ratios are clipped to 1 - epsilon … 1 +
    epsilon_high (DAPO, arXiv:2503.14476, eq. 10), by default to 1 ± epsilon. `delta`, above 1 + epsilon_high, bounds
    them for negative advantages too (two-sided clipping, INTELLECT-2, arXiv:2505.07291). `beta` weighs the divergence
    from the reference, and `unbiased_kl` multiplies that by the ratio (arXiv:2512.02556; TRL's default).
    `importance_cap` is C of the truncated weights min(π_old / μ, C) of each token, which make up for a sampler unlike
    the trainer (Yao et al. 2025, https://fengyao.notion.site/off-policy-rl); None: no weights.

    Raises ValueError for values out of range and options that the loss has no use for.
    """

    name: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"] = "dapo"
    importance: Literal["token", "sequence", "sequence_token"] = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    unbiased_kl: bool = False
    importance_cap: float | None = None

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise ValueError(f"loss {self.name!r} is none of {', '.join(LOSSES)}")
        if self.importance not in IMPORTANCE:
            raise ValueError(f"importance {self.importance!r} is none of {', '.join(IMPORTANCE)}")
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"epsilon {self.epsilon} must be from 0 to 1")
        if not 0 <= self.clip_high - 1 < math.inf:
            raise ValueError(f"epsilon_high {self.epsilon_high} must be at least 0 and finite")
        if self.delta is not None and not self.clip_high < self.delta < math.inf:
            raise ValueError(f"delta {self.delta} must be finite and above 1 + epsilon_high, {self.clip_high}")
        if self.delta is not None and self.name == "cispo":
            raise ValueError(f"delta {self.delta} has no meaning for cispo, which clips weights, not the objective")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta {self.beta} must be at least 0 and finite")
        if self.unbiased_kl and self.beta == 0:
            raise ValueError("unbiased_kl needs beta above 0, not 0")
        if self.importance_cap is not None and not 0 < self.importance_cap < math.inf:
            raise ValueError(f"importance_cap {self.importance_cap} must be above 0 and finite")

    @property
    def clip_high(self) -> float:
        """The largest ratio that is not clipped."""
        return 1 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)


def policy_loss(
    logprobs_BT: Float[Array, "B T"],
    *,
    entropy_BT: Float[Array, "B T"],
    mask_BT: Bool[Array, "B T"] | Float[Array, "B T"],
    advantages_B: Float[Array, "B"],
    old_logprobs_BT: Float[Array, "B T"] | None = None,
    sampler_logprobs_BT: Float[Array, "B T"] | None = None,
    reference_logprobs_BT: Float[Array, "B T"] | None = None,
    weights_BT: Float[Array, "B T"] | None = None,
    rollout_tokens_B: Float[Array, "B"] | None = None,
    max_completion: int,
    config: PolicyLossConfig,
) -> Loss:
    """The loss of completions: of each token -f min(r A, clip(r) A) + beta KL, put together as `config.name` says.

    f is the token's weight in `weights_BT`, see `top_entropy_weights`, times its truncated importance weight. KL is k3,
    ref / π - log(ref / π) - 1 (http://joschu.net/blog/kl-approx.html; GRPO, arXiv:2402.03300, eq. 4), to which f does
    not apply. Only `logprobs_BT` has a gradient.

    Tokens outside the mask may have any values. `old_logprobs_BT` None: those of now, as in a first update.
    `rollout_tokens_B` is for updates that take a part of a rollout each: the mean number of active tokens of a
    completion over the whole rollout, the same in each row; see `dapo`. A log(r) or log(ref / π) above 20 is taken to
    be 20, without gradient, so that nothing overflows; in TRL it may.

    Metrics have TRL's names: `entropy`; `kl`, with a reference; `clip_ratio/*` or `cispo_clip_ratio`. With the
    sampler's log-probabilities `sampler_logprob_diff`, the mean distance from them of `old_logprobs_BT`, and with a cap
    `sampling/importance_sampling_ratio/mean`, of the truncated weights. Raises ValueError where the config needs
    log-probabilities that are not given.
    """
    _check_inputs(config, sampler_logprobs_BT, reference_logprobs_BT)
    active_BT = mask_BT != 0
    logprobs_BT = jnp.where(active_BT, logprobs_BT, 0)
    now_BT = jax.lax.stop_gradient(logprobs_BT)
    entropy_BT = _constant(entropy_BT, active_BT, 0)
    old_BT = _constant(old_logprobs_BT, active_BT, now_BT)
    mask_BT = active_BT.astype(jnp.float32)
    ratio_BT = bounded_exp(IMPORTANCE[config.importance](logprobs_BT, old_BT, mask_BT))

    values_BT = {"entropy": entropy_BT}
    factor_BT, penalty_BT = _constant(weights_BT, active_BT, 1), jnp.zeros_like(logprobs_BT)
    if reference_logprobs_BT is not None:
        kl_BT = _k3(_constant(reference_logprobs_BT, active_BT, now_BT) - logprobs_BT)
        values_BT["kl"] = kl_BT * ratio_BT if config.unbiased_kl else kl_BT
        penalty_BT = config.beta * values_BT["kl"]
    if sampler_logprobs_BT is not None:
        drift_BT = old_BT - _constant(sampler_logprobs_BT, active_BT, old_BT)
        values_BT["sampler_logprob_diff"] = jnp.abs(drift_BT)
        if config.importance_cap is not None:
            truncated_BT = jnp.minimum(jnp.exp(drift_BT), config.importance_cap)
            values_BT["sampling/importance_sampling_ratio/mean"] = truncated_BT
            factor_BT = factor_BT * truncated_BT
    tokens = Tokens(
        logprobs_BT=logprobs_BT,
        ratio_BT=ratio_BT,
        advantages_B1=jax.lax.stop_gradient(advantages_B[:, None]),
        factor_BT=factor_BT,
        penalty_BT=penalty_BT,
        mask_BT=mask_BT,
        clip_low=1 - config.epsilon,
        clip_high=config.clip_high,
        delta=config.delta,
        max_completion=max_completion,
        rollout_tokens_B=rollout_tokens_B,
    )
    loss = LOSSES[config.name](tokens)
    metrics = {name: (jnp.sum(value_BT * mask_BT), jnp.sum(mask_BT)) for name, value_BT in values_BT.items()}
    return loss._replace(metrics=jax.lax.stop_gradient(metrics | loss.metrics))


def top_entropy_weights(
    entropy_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"] | Float[Array, "B T"], share: float
) -> Float[Array, "B T"]:
    """1 for the share of active tokens with the highest entropy, ties with the last of them too, and 0 for the others.

    To be taken over all completions of an update, not of a micro-batch. Source: arXiv:2506.01939, sec. 5, where
    share = 0.2; the loss is still divided by all tokens. As in TRL the threshold is between two entropies where the
    share falls between them. Raises ValueError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share {share} must be above 0 and at most 1")
    active_BT = mask_BT != 0
    threshold = jnp.nanquantile(jnp.where(active_BT, entropy_BT, jnp.nan), 1 - share)
    return (active_BT & (entropy_BT >= threshold)).astype(jnp.float32)


def _check_inputs(config: PolicyLossConfig, sampler_BT: Array | None, reference_BT: Array | None) -> None:
    """Raises ValueError where an option lacks what it works on."""
    if config.beta and reference_BT is None:
        raise ValueError(f"beta {config.beta} needs the log-probabilities of a reference")
    if config.importance_cap is not None and sampler_BT is None:
        raise ValueError(f"importance_cap {config.importance_cap} needs the log-probabilities of the sampler")


def _constant(values_BT: Array | None, active_BT: Array, default: Array | float) -> Array:
    """The values without gradient, where there are any and the mask counts the token, else the default."""
    if values_BT is None:
        return jnp.broadcast_to(jnp.asarray(default, jnp.float32), active_BT.shape)
    return jax.lax.stop_gradient(jnp.where(active_BT, values_BT, default))


def bounded_exp(log: Array) -> Array:
    """exp of the logarithm of a ratio, as of 20 where it is above, without gradient."""
    return jnp.exp(jnp.minimum(log, HIGHEST_LOG))


def _k3(log: Array) -> Array:
    """exp(x) - x - 1 of x = log(ref / π)."""
    log = jnp.minimum(log, HIGHEST_LOG)
    return jnp.exp(log) - log - 1
