"""From the rewards of a rollout to advantages, on the host: numpy, float64, NaN where a reward does not apply.

Letters here: N completions, F reward functions, B prompts, C completions of a prompt.
"""

from typing import Literal

import numpy as np

from utils.shapes import Array, Float

ESTIMATORS = ("group", "rloo")
SCALES = ("group", "batch", "none")
_LEAST_STD = 1e-4  # added to what is divided by


def combine(rewards_NF: Float[Array, "N F"], weights_F: Float[Array, "F"]) -> Float[Array, "N"]:
    """The weighted sum of the rewards that apply to each completion, float64; NaN where none does.

    Raises ValueError for infinite rewards and for weights of another number than F.
    """
    rewards_NF, weights_F = np.asarray(rewards_NF, np.float64), np.asarray(weights_F, np.float64)
    if weights_F.shape != rewards_NF.shape[1:]:
        raise ValueError(f"{weights_F.size} weights do not fit rewards of {rewards_NF.shape[1]} functions")
    if np.isinf(rewards_NF).any():
        raise ValueError(f"completion {np.argwhere(np.isinf(rewards_NF))[0, 0]} has an infinite reward")
    applies_NF = ~np.isnan(rewards_NF)
    total_N = np.where(applies_NF, rewards_NF * weights_F, 0).sum(axis=1)
    return np.where(applies_NF.any(axis=1), total_N, np.nan)


def advantages(
    rewards_BC: Float[Array, "B C"],
    *,
    estimator: Literal["group", "rloo"] = "group",
    scale: Literal["group", "batch", "none"] = "group",
) -> Float[Array, "B C"]:
    """How much better each completion is than the others of its prompt; float32, 0 where the reward is NaN.

    `estimator` is what the reward is compared with: "group", the mean of the group (GRPO, arXiv:2402.03300, sec.
    4.1.2), or "rloo", the mean of the others of the group (REINFORCE leave-one-out, arXiv:2402.14740), which makes
    C / (C - 1) of the former. NaN rewards have no part in a mean. A completion alone in its group has advantage 0.

    `scale` is what the difference is divided by: "group", the standard deviation of the group (GRPO, as above);
    "batch", that of all rewards (arXiv:2508.08221); "none", nothing (Dr. GRPO, arXiv:2503.20783, sec. 3.2; RLOO).

    As in TRL and unlike in the papers, 1e-4 is added to a standard deviation, which is the unbiased one (n - 1).
    Raises ValueError for other names.
    """
    if estimator not in ESTIMATORS or scale not in SCALES:
        raise ValueError(
            f"estimator {estimator!r} must be one of {', '.join(ESTIMATORS)}, scale {scale!r} of {', '.join(SCALES)}"
        )
    rewards_BC = np.asarray(rewards_BC, np.float64)
    counts_B1, means_B1, std_B1 = _moments(rewards_BC)
    result_BC = rewards_BC - means_B1
    if estimator == "rloo":
        result_BC *= counts_B1 / np.maximum(counts_B1 - 1, 1)
    if scale == "group":
        result_BC /= std_B1 + _LEAST_STD
    elif scale == "batch":
        result_BC /= _moments(rewards_BC.reshape(1, -1))[2] + _LEAST_STD
    return np.nan_to_num(result_BC, nan=0.0).astype(np.float32)


def has_spread(rewards_BC: Float[Array, "B C"]) -> np.ndarray:
    """bool [B], True where two completions of a prompt differ in reward, by more than rounding.

    Of the others nothing is learnt. TRL's `frac_reward_zero_std` is the share of False, but for groups of fewer than
    two known rewards, which it leaves out. Source of replacing such groups: DAPO, arXiv:2503.14476, eq. 11.
    """
    rewards_BC = np.asarray(rewards_BC, np.float64)
    highest_B = np.max(rewards_BC, axis=1, initial=-np.inf, where=~np.isnan(rewards_BC))
    lowest_B = np.min(rewards_BC, axis=1, initial=np.inf, where=~np.isnan(rewards_BC))
    return highest_B - lowest_B > 1e-8


def _moments(rewards_BC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, mean and unbiased standard deviation, each [B, 1], of the rewards that are not NaN; 0 where there are too
    few."""
    applies_BC = ~np.isnan(rewards_BC)
    counts_B1 = applies_BC.sum(axis=1, keepdims=True)
    means_B1 = np.where(applies_BC, rewards_BC, 0).sum(axis=1, keepdims=True) / np.maximum(counts_B1, 1)
    squares_B1 = (np.where(applies_BC, rewards_BC - means_B1, 0) ** 2).sum(axis=1, keepdims=True)
    return counts_B1, means_B1, np.sqrt(squares_B1 / np.maximum(counts_B1 - 1, 1))
