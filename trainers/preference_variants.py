"""The losses of pairs of completions, chosen by name: DPO and its kin.

Letters here: B pairs. π is the policy that is trained, ref the reference; y_w the chosen completion of a prompt, y_l
the rejected one, |y| the number of a completion's active tokens, those that the mask counts. Everything is float32,
log-probabilities are in nats. r_w and r_l are the rewards of the two, β log(π(y) / ref(y)), see `rewards`, and
Δ = r_w - r_l; σ is the logistic function.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from utils.shapes import Array

_LEAST_DOUBT = 1e-6  # of a mean log-probability: nearer to 0 the odds are as good as infinite, and have no gradient


@dataclass(frozen=True, kw_only=True)
class PreferenceLossConfig:
    """Which loss, of `LOSSES` or "kto", and its options.

    `beta` is β: what log-ratios are multiplied by, τ of IPO, λ of ORPO. `label_smoothing` is the share of pairs taken
    to be labelled the wrong way round. `length_normalised` divides the log-ratio of each completion by its number of
    tokens; ipo, simpo and orpo always do, and take no such option. `simpo_gamma` is γ of SimPO, the margin aimed at,
    in units of rewards. `sft_weight` weighs -log π(y_w) / |y_w|, added to the loss (RPO, arXiv:2404.19733, eq. 1); orpo
    has such a term of its own. `desirable_weight` and `undesirable_weight` are λ_D and λ_U of KTO.

    Raises ValueError for values out of range and options that the loss has no use for, unless they are the default.
    """

    name: Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down", "simpo", "orpo", "kto"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalised: bool = False
    simpo_gamma: float = 0.5
    sft_weight: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in OPTIONS:
            raise ValueError(f"loss {self.name!r} is none of {', '.join(OPTIONS)}")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta {self.beta} must be above 0 and finite")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("name", "beta", *OPTIONS[self.name]) and value != field.default:
                raise ValueError(f"loss {self.name!r} has no use for {field.name} {value}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing {self.label_smoothing} must be at least 0 and below 0.5")
        for name in ("simpo_gamma", "sft_weight", "desirable_weight", "undesirable_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 0 and finite")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with a reference."""
        return self.name not in ("simpo", "orpo")

    @property
    def paired(self) -> bool:
        """Whether the loss is of pairs: a chosen and a rejected completion of one prompt."""
        return self.name in LOSSES

    @property
    def averages(self) -> bool:
        """Whether log-ratios are means over tokens, not sums."""
        return self.length_normalised or self.name in ("ipo", "simpo", "orpo")


class Pairs(NamedTuple):
    """Log-probabilities of completions, sums over their active tokens; the reference's are 0 where there is none."""

    chosen_B: Array
    rejected_B: Array
    reference_chosen_B: Array
    reference_rejected_B: Array
    chosen_tokens_B: Array
    rejected_tokens_B: Array


def mean_of(sums: Array, tokens: Array) -> Array:
    """Sums by the number of tokens; 0 where there are none."""
    return sums / jnp.maximum(tokens, 1)


def rewards(pairs: Pairs, config: PreferenceLossConfig) -> tuple[Array, Array]:
    """r_w and r_l, what the losses compare: β log(π / ref), or β log π without a reference.

    Divided by the number of tokens where `config.averages`. Source: DPO, arXiv:2305.18290, eq. 5 without the term that
    is the same for both.
    """
    chosen_B = pairs.chosen_B - pairs.reference_chosen_B
    rejected_B = pairs.rejected_B - pairs.reference_rejected_B
    if config.averages:
        chosen_B, rejected_B = mean_of(chosen_B, pairs.chosen_tokens_B), mean_of(rejected_B, pairs.rejected_tokens_B)
    return config.beta * chosen_B, config.beta * rejected_B


def sigmoid(pairs: Pairs, config: PreferenceLossConfig) -> Array:
    """-(1 - ε) log σ(Δ) - ε log σ(-Δ), ε the label smoothing.

    Source: DPO, arXiv:2305.18290, eq. 7; with ε conservative DPO, https://ericmitchell.ai/cdpo.pdf. Averaged over
    tokens it is TRL's sigmoid_norm.
    """
    margin_B = _margin(pairs, config)
    smoothing = config.label_smoothing
    return -(1 - smoothing) * jax.nn.log_sigmoid(margin_B) - smoothing * jax.nn.log_sigmoid(-margin_B)


def ipo(pairs: Pairs, config: PreferenceLossConfig) -> Array:
    """(Δ / β - 1 / (2 β))², with log-ratios averaged over tokens. Source: IPO, arXiv:2310.12036, eq. 17, τ = β.

    Deviation from the paper: its log-ratios are sums. Averages, which keep the target within the reach of
    completions of any length, are what TRL and most others compute, and according to TRL what the paper's results
    are of.
    """
    return jnp.square((_margin(pairs, config) - 0.5) / config.beta)


def hinge(pairs: Pairs, config: PreferenceLossConfig) -> Array:
    """max(0, 1 - Δ). Source: RSO, arXiv:2309.06657, hinge-norm: the loss of SLiC, arXiv:2305.10425, of log-ratios."""
    return jax.nn.relu(1 - _margin(pairs, config))


def robust(pairs: Pairs, config: PreferenceLossConfig) -> Array:
    """(-(1 - ε) log σ(Δ) + ε log σ(-Δ)) / (1 - 2 ε), the unbiased loss where the share ε of labels is flipped.

    Source: rDPO, arXiv:2403.00409, sec. 3. It has no lower bound. It is computed as -log σ(Δ) - Δ ε / (1 - 2 ε), the
    same without a difference of large numbers.
    """
    margin_B = _margin(pairs, config)
    flipped = config.label_smoothing
    return -jax.nn.log_sigmoid(margin_B) - margin_B * flipped / (1 - 2 * flipped)


def apo_zero(pairs: Pairs, config: PreferenceLossConfig) -> Array:
    """1 - σ(r_w) + σ(r_l): the chosen up, the rejected down. Source: APO, arXiv:2408.06266, eq. 7, for chosen
    completions that are better than the policy's own; plus 1, as in TRL, so that the loss is above 0."""
    chosen_B, rejected_B = rewards(pairs, config)
    return jax.nn.sigmoid(-chosen_B) + jax.nn.sigmoid(rejected_B)


def apo_down(pairs: Pairs, config: PreferenceLossConfig) -> Array:
    """1 + σ(r_w) - σ(Δ): both down, the rejected more. Source: APO, arXiv:2408.06266, eq. 8, for chosen completions
    that are worse than the policy's own; plus 1, as in TRL, so that the loss is above 0."""
    chosen_B, rejected_B = rewards(pairs, config)
    return jax.nn.sigmoid(chosen_B) + jax.nn.sigmoid(rejected_B - chosen_B)


def simpo(pairs: Pairs, config: PreferenceLossConfig) -> Array:
    """-log σ(β log π(y_w) / |y_w| - β log π(y_l) / |y_l| - γ), without a reference.

    Source: SimPO, arXiv:2405.14734, eq. 6, whose β is from 2 to 10. TRL has it in its CPOTrainer, by default with an
    SFT term.
    """
    return -jax.nn.log_sigmoid(_margin(pairs, config) - config.simpo_gamma)


def orpo(pairs: Pairs, config: PreferenceLossConfig) -> Array:
    """-log P_w - β log σ(log-odds of y_w - log-odds of y_l), log P = log π(y) / |y|, odds = P / (1 - P).

    Source: ORPO, arXiv:2403.07691, eq. 3 to 7, λ = β. Odds stop to grow, and have no gradient, where log P is above
    -1e-6. Deviations from TRL: the first term is the mean over pairs of each one's token mean, and of the completion;
    TRL takes the mean over all tokens of the micro-batch, those of prompts among them.
    """
    return chosen_nll(pairs) - config.beta * jax.nn.log_sigmoid(log_odds_ratio(pairs))


def chosen_nll(pairs: Pairs) -> Array:
    """-log π(y_w) / |y_w|, the mean negative log-likelihood of a chosen token."""
    return -mean_of(pairs.chosen_B, pairs.chosen_tokens_B)


def log_odds_ratio(pairs: Pairs) -> Array:
    """Log-odds of y_w less those of y_l; see `orpo`."""

    def log_odds(sums_B: Array, tokens_B: Array) -> Array:
        logprob_B = jnp.minimum(mean_of(sums_B, tokens_B), -_LEAST_DOUBT)
        return logprob_B - jax.nn.log1mexp(-logprob_B)

    return log_odds(pairs.chosen_B, pairs.chosen_tokens_B) - log_odds(pairs.rejected_B, pairs.rejected_tokens_B)


def odds_metrics(pairs: Pairs) -> dict[str, Array]:
    """What TRL shows of orpo, of each pair."""
    odds_B = log_odds_ratio(pairs)
    return {"log_odds_ratio": jax.nn.log_sigmoid(odds_B), "log_odds_chosen": odds_B, "nll_loss": chosen_nll(pairs)}


def _margin(pairs: Pairs, config: PreferenceLossConfig) -> Array:
    """Δ."""
    chosen_B, rejected_B = rewards(pairs, config)
    return chosen_B - rejected_B


# Functions of pairs and the config to the loss of each pair.
LOSSES: dict[str, Callable[[Pairs, PreferenceLossConfig], Array]] = {
    "sigmoid": sigmoid,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "simpo": simpo,
    "orpo": orpo,
}

# What is to be seen of a loss besides rewards and log-probabilities, of each pair.
OBSERVED: dict[str, Callable[[Pairs], dict[str, Array]]] = {"orpo": odds_metrics}

# What a loss has a use for, besides beta.
OPTIONS: dict[str, tuple[str, ...]] = {
    "sigmoid": ("label_smoothing", "length_normalised", "sft_weight"),
    "ipo": ("sft_weight",),
    "hinge": ("length_normalised", "sft_weight"),
    "robust": ("label_smoothing", "length_normalised", "sft_weight"),
    "apo_zero": ("length_normalised", "sft_weight"),
    "apo_down": ("length_normalised", "sft_weight"),
    "simpo": ("simpo_gamma", "sft_weight"),
    "orpo": (),
    "kto": ("desirable_weight", "undesirable_weight"),
}
