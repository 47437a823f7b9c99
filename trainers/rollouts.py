"""How completions are drawn for training, and what a function that draws them is to return."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from models.llama import LLaMa


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """`completions` of each prompt, of up to `max_completion_length` tokens.

    `rows_at_once` of all the completions of a rollout are drawn together, null for all: their keys and values have to
    fit into memory. The filters are those of `sampling.SamplingParams`. Log-probabilities, and so the loss, are of
    softmax(logits / temperature) whatever the filters leave out.
    """

    max_completion_length: int
    completions: int = 8
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    rows_at_once: int | None = None

    def __post_init__(self) -> None:
        if self.max_completion_length < 1 or self.completions < 1:
            raise ValueError(
                f"max_completion_length {self.max_completion_length} and completions {self.completions} must be "
                "at least 1"
            )
        if self.rows_at_once is not None and self.rows_at_once < self.completions:
            raise ValueError(
                f"rows_at_once {self.rows_at_once} must be at least completions {self.completions}: those of a prompt "
                "are drawn together"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} must be above 0: greedy completions are all the same")


class Rollout(Protocol):
    """Completions as arrays, rows side by side by prompt: `inference.rollout.Rollout`."""

    tokens_BM: np.ndarray
    count_B: np.ndarray
    logprobs_BM: np.ndarray
    stopped_B: np.ndarray


# Of a model, prompts as token ids and a number for each prompt, from which the draws of its completions come.
RollOut = Callable[[LLaMa, Sequence[Sequence[int]], Sequence[int]], Rollout]
