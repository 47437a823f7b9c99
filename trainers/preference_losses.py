"""Losses of preferences: of pairs of completions, of single ones that are desirable or not, and of scores of pairs.

Letters here: B rows, C the completions of a row, M tokens of a completion. Signs as in `trainers.preference_variants`.
All are sums over rows, each times its weight, so that micro-batches, devices and the order of rows change no loss. A
row of weight 0, such as one that only fills up a batch, contributes nothing, and may hold any values.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from trainers.preference_variants import LOSSES, OBSERVED, Pairs, PreferenceLossConfig, chosen_nll, rewards
from trainers.trainer import Loss
from utils.shapes import Array, Bool, Float

__all__ = [
    "LOSSES",
    "Pairs",
    "PreferenceLossConfig",
    "RewardLossConfig",
    "kto_loss",
    "preference_loss",
    "reward_loss",
]


@dataclass(frozen=True, kw_only=True)
class RewardLossConfig:
    """`centre` weighs the squared sum of a pair's scores, which keeps them near 0; see `reward_loss`."""

    centre: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.centre < math.inf:
            raise ValueError(f"centre {self.centre} must be at least 0 and finite")


def preference_loss(
    logprobs_BCM: Float[Array, "B 2 M"],
    *,
    mask_BCM: Bool[Array, "B 2 M"] | Float[Array, "B 2 M"],
    reference_logps_BC: Float[Array, "B 2"] | None,
    weights_B: Float[Array, "B"],
    config: PreferenceLossConfig,
) -> Loss:
    """The loss of pairs, the chosen completion first: see `LOSSES`. Weight: that of the rows.

    `logprobs_BCM` are those of tokens, float32; outside the mask they may have any values. `reference_logps_BC` are
    sums over the active tokens; a loss without a reference does not read them. Only `logprobs_BCM` has a gradient.

    Metrics have TRL's names. `rewards/chosen` and `rewards/rejected` are r_w and r_l, `rewards/margins` their
    difference, and `rewards/accuracies` how often it is above 0, where a tie counts half: 0.5 where policy and
    reference give the same numbers. `logps/*` are sums over tokens. With an SFT term `nll_loss`; of orpo also
    `log_odds_chosen`, the difference of log-odds, and `log_odds_ratio`, log σ of it.

    Deviations from TRL: its rewards of ipo and sigmoid_norm are of sums, though those losses compare averages; its
    `logps/*` of simpo and orpo are averages; ties count nothing; its SFT terms are means over the tokens of a
    micro-batch, not over pairs. Raises ValueError for kto, and where the reference is missing.
    """
    if not config.paired:
        raise ValueError(f"loss {config.name!r} is not of pairs")
    sums_BC, reference_BC, tokens_BC = _sums(logprobs_BCM, mask_BCM, reference_logps_BC, weights_B, config)
    pairs = Pairs(*sums_BC.T, *reference_BC.T, *tokens_BC.T)
    loss_B = LOSSES[config.name](pairs, config)
    chosen_B, rejected_B = rewards(pairs, config)
    values = {
        "rewards/chosen": chosen_B,
        "rewards/rejected": rejected_B,
        "rewards/accuracies": _wins(chosen_B, rejected_B),
        "rewards/margins": chosen_B - rejected_B,
        "logps/chosen": pairs.chosen_B,
        "logps/rejected": pairs.rejected_B,
    }
    if config.name in OBSERVED:
        values |= OBSERVED[config.name](pairs)
    if config.sft_weight:
        values["nll_loss"] = chosen_nll(pairs)
        loss_B = loss_B + config.sft_weight * values["nll_loss"]
    return _weighed(loss_B, weights_B, {name: (value_B, weights_B) for name, value_B in values.items()})


def kto_loss(
    logprobs_BCM: Float[Array, "B 1 M"],
    *,
    mask_BCM: Bool[Array, "B 1 M"] | Float[Array, "B 1 M"],
    reference_logps_BC: Float[Array, "B 1"],
    kl_B: Float[Array, "B"],
    desirable_B: Bool[Array, "B"] | Float[Array, "B"],
    weights_B: Float[Array, "B"],
    config: PreferenceLossConfig,
) -> Loss:
    """λ_D (1 - σ(r - β z)) of desirable completions, λ_U (1 - σ(β z - r)) of others. Weight: that of the rows.

    Source: KTO, arXiv:2402.01306, sec. 4. `kl_B` is the baseline z, an estimate of KL(π ‖ ref) over the whole batch,
    in nats, at least 0 and the same in each row; it has no gradient. `desirable_B` is 1 or 0. The rest as in
    `preference_loss`.

    Metrics: `rewards/*` and `logps/*`, means over the desirable ("chosen") and the other ("rejected") rows, with a
    weight of 0 where there are none of them, and `kl`, z. Unlike TRL there is no `rewards/margins`: a difference of two
    means over different rows is no mean. Raises ValueError for other losses.
    """
    if config.paired:
        raise ValueError(f"loss {config.name!r} is of pairs, not of single completions")
    sums_BC, reference_BC, _ = _sums(logprobs_BCM, mask_BCM, reference_logps_BC, weights_B, config)
    logps_B, active_B, desirable_B = sums_BC[:, 0], weights_B != 0, desirable_B != 0
    kl_B = jax.lax.stop_gradient(jnp.where(active_B, kl_B, 0))
    reward_B = config.beta * (logps_B - reference_BC[:, 0])
    margin_B = jnp.where(desirable_B, 1, -1) * (reward_B - config.beta * kl_B)
    loss_B = jnp.where(desirable_B, config.desirable_weight, config.undesirable_weight) * jax.nn.sigmoid(-margin_B)
    sides = {"chosen": weights_B * desirable_B, "rejected": weights_B * ~desirable_B}
    metrics = {f"rewards/{side}": (reward_B, share_B) for side, share_B in sides.items()}
    metrics |= {f"logps/{side}": (logps_B, share_B) for side, share_B in sides.items()}
    return _weighed(loss_B, weights_B, metrics | {"kl": (kl_B, weights_B)})


def reward_loss(
    scores_B2: Float[Array, "B 2"],
    *,
    margins_B: Float[Array, "B"] | None,
    weights_B: Float[Array, "B"],
    centre: float,
) -> Loss:
    """-log σ(s_w - s_l - m) + centre (s_w + s_l)² of the scores of pairs, the chosen one first. Weight: of the rows.

    Source: Bradley and Terry 1952; the margin m, of how much better the chosen one is, Llama 2, arXiv:2307.09288,
    eq. 2; centring, which keeps scores near 0, arXiv:2312.09244. Only the scores have a gradient.

    Metrics: `accuracy`, how often s_w is above s_l, where a tie counts half (in TRL nothing), `margin`, the mean of
    s_w - s_l, `rewards/chosen` and `rewards/rejected`, the mean scores, and TRL's `mean_reward` of both. Its smallest
    and largest scores are no means, and left out. Raises ValueError if `centre` is below 0 or not finite.
    """
    if not 0 <= centre < float("inf"):
        raise ValueError(f"centre {centre} must be at least 0 and finite")
    active_B = weights_B != 0
    chosen_B, rejected_B = jnp.where(active_B[:, None], scores_B2, 0).astype(jnp.float32).T
    margin_B = 0 if margins_B is None else jax.lax.stop_gradient(jnp.where(active_B, margins_B, 0))
    loss_B = -jax.nn.log_sigmoid(chosen_B - rejected_B - margin_B) + centre * jnp.square(chosen_B + rejected_B)
    values = {
        "accuracy": _wins(chosen_B, rejected_B),
        "margin": chosen_B - rejected_B,
        "rewards/chosen": chosen_B,
        "rewards/rejected": rejected_B,
        "mean_reward": (chosen_B + rejected_B) / 2,
    }
    return _weighed(loss_B, weights_B, {name: (value_B, weights_B) for name, value_B in values.items()})


def _sums(
    logprobs_BCM: Array, mask_BCM: Array, reference_BC: Array | None, weights_B: Array, config: PreferenceLossConfig
) -> tuple[Array, Array, Array]:
    """Log-probabilities of completions, the reference's, and active tokens, [B, C] each; 0 in rows of weight 0."""
    active_B11 = (weights_B != 0)[:, None, None]
    active_BCM = (mask_BCM != 0) & active_B11
    sums_BC = jnp.sum(jnp.where(active_BCM, logprobs_BCM, 0), axis=-1)
    tokens_BC = jnp.sum(active_BCM, axis=-1, dtype=jnp.float32)
    if not config.needs_reference:
        return sums_BC, jnp.zeros_like(sums_BC), tokens_BC
    if reference_BC is None:
        raise ValueError(f"loss {config.name!r} needs the log-probabilities of a reference")
    return sums_BC, jax.lax.stop_gradient(jnp.where(active_B11[..., 0], reference_BC, 0)), tokens_BC


def _wins(chosen_B: Array, rejected_B: Array) -> Array:
    """1 where the chosen is above the rejected, 0.5 where they are equal, else 0."""
    return (1 + jnp.sign(chosen_B - rejected_B)) / 2


def _weighed(loss_B: Array, weights_B: Array, values: dict[str, tuple[Array, Array]]) -> Loss:
    """Sums over rows; each metric with weights of its own. Only the loss has a gradient."""
    weights_B, values = jax.lax.stop_gradient((weights_B, values))
    metrics = {name: (jnp.sum(value_B * share_B), jnp.sum(share_B)) for name, (value_B, share_B) in values.items()}
    return Loss(jnp.sum(loss_B * weights_B), jnp.sum(weights_B), metrics)
