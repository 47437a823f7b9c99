"""Prompts with their completions and what these were given: from a rollout to arrays and metrics, on the host.

Letters as in `trainers.policy`; P prompts, F rewards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import numpy as np

from data.prompts import Prompt, gather_columns
from trainers.advantages import combine
from trainers.policy import from_the_right, padded_size
from trainers.rewards import Reward, score
from trainers.rollouts import Rollout


@dataclass(frozen=True)
class Group:
    """A prompt with its C completions, arrays [C, ...], and what they were given; total_C is NaN where nothing is."""

    prompt: Prompt
    tokens_CM: np.ndarray
    count_C: np.ndarray
    logprobs_CM: np.ndarray
    stopped_C: np.ndarray
    texts: tuple[str, ...]
    rewards_CF: np.ndarray
    total_C: np.ndarray


def grouped(
    prompts: Sequence[Prompt], rollout: Rollout, rewards: Sequence[Reward], decode: Callable[[Sequence[int]], str]
) -> list[Group]:
    """Completions as text, with their rewards, by prompt. Raises RewardError as `trainers.rewards.score` does."""
    C = len(rollout.count_B) // len(prompts)
    ids = [tokens_M[:count].tolist() for tokens_M, count in zip(rollout.tokens_BM, rollout.count_B)]
    spoken = [own[:-1] if stopped else own for own, stopped in zip(ids, rollout.stopped_B)]
    texts = [decode(own) for own in spoken]
    owners = [prompt for prompt in prompts for _ in range(C)]
    rewards_NF = score(
        rewards,
        [owner.prompt if isinstance(owner.prompt, str) else list(owner.prompt) for owner in owners],
        [
            text if isinstance(owner.prompt, str) else [{"role": "assistant", "content": text}]
            for owner, text in zip(owners, texts)
        ],
        ids,
        gather_columns(owners),
    )
    total_N = combine(rewards_NF, np.array([reward.weight for reward in rewards]))
    groups = []
    for number, prompt in enumerate(prompts):
        rows = slice(number * C, (number + 1) * C)
        arrays = (rollout.tokens_BM, rollout.count_B, rollout.logprobs_BM, rollout.stopped_B)
        groups.append(Group(prompt, *(x[rows] for x in arrays), tuple(texts[rows]), rewards_NF[rows], total_N[rows]))
    return groups


def first_of(rollout: Rollout, count: int, *, of: int) -> Rollout:
    """The completions of the first so many prompts of a rollout, of so many in all."""
    rows = len(rollout.count_B) // of * count
    names = ("tokens_BM", "count_B", "logprobs_BM", "stopped_B")
    return SimpleNamespace(**{name: getattr(rollout, name)[:rows] for name in names})


def padded(groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """Arrays of a row for each prompt, of sizes of which there are few: those of `trainers.policy.Completions`,
    `mask_BCM`, bool, True for the tokens that were drawn, and `sampler_logprobs_BCM`."""
    lengths_P = np.array([len(group.prompt.ids) for group in groups], np.int32)
    count_PC = np.stack([group.count_C for group in groups])
    M = padded_size(int(count_PC.max()), groups[0].tokens_CM.shape[1])
    S = padded_size(int(lengths_P.max()), 2**31)
    return dict(
        prompts_BS=from_the_right([group.prompt.ids for group in groups], S),
        prompt_lengths_B=lengths_P,
        completions_BCM=np.stack([group.tokens_CM[:, :M] for group in groups]),
        mask_BCM=np.arange(M) < count_PC[..., None],
        sampler_logprobs_BCM=np.stack([group.logprobs_CM[:, :M] for group in groups]),
    )


def split_rows(batch: Any, pieces: int) -> Any:
    """A batch with each row as so many rows of fewer completions; the prompt is in all of them."""
    if pieces == 1:
        return batch
    split = {}
    for name in (field.name for field in fields(batch)):
        x = getattr(batch, name)
        if x is None or name in ("prompts_BS", "prompt_lengths_B"):
            split[name] = None if x is None else np.repeat(x, pieces, axis=0)
        else:
            split[name] = x.reshape(x.shape[0] * pieces, x.shape[1] // pieces, *x.shape[2:])
    return type(batch)(**split)


def count_pieces(prompts: int, completions: int, rows: int) -> int:
    """The least number of rows for each prompt such that all are a multiple of `rows`. Raises ValueError for none."""
    for pieces in range(1, completions + 1):
        if completions % pieces == 0 and prompts * pieces % rows == 0:
            return pieces
    raise ValueError(
        f"batch_size {prompts} x {completions} completions cannot be cut evenly into {rows} parts, one for each "
        "micro-batch and device"
    )


def reward_metrics(groups: Sequence[Group], names: Sequence[str]) -> dict[str, float]:
    """Mean and standard deviation of all completions' rewards, and of each reward by its name."""
    total_PC = np.stack([group.total_C for group in groups])
    rewards_NF = np.concatenate([group.rewards_CF for group in groups])
    metrics = {"reward": mean(total_PC), "reward_std": _std(total_PC)}
    for name, values_N in zip(names, rewards_NF.T):
        metrics |= {f"rewards/{name}/mean": mean(values_N), f"rewards/{name}/std": _std(values_N)}
    return metrics


def length_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Tokens of completions, of all and of those that came to an end; the share of those that did not."""
    lengths_N = np.concatenate([group.count_C for group in groups])
    stopped_N = np.concatenate([group.stopped_C for group in groups])
    metrics = {"completions/clipped_ratio": float(np.mean(~stopped_N))}
    for kind, own in (("", lengths_N), ("_terminated", lengths_N[stopped_N])):
        for name, function in (("mean", np.mean), ("min", np.min), ("max", np.max)):
            metrics[f"completions/{name}{kind}_length"] = float(function(own)) if own.size else 0.0
    return metrics


def mean(values: np.ndarray) -> float:
    """The mean of those that are not NaN; NaN where all are."""
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def _std(values: np.ndarray) -> float:
    """The unbiased standard deviation of those that are not NaN; 0 of one alone."""
    values = values[~np.isnan(values)]
    return float(values.std(ddof=1)) if values.size > 1 else 0.0
