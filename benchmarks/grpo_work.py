"""What the sides of `benchmarks.grpo` are told, and what they answer. Without what is heavy, for any environment."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import LOWEST_ID
from benchmarks.turns import Turns

NUM_BATCHES = 64  # of prompts; then the first again


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What every side is to do: steps from the checkpoint in `folder`.

    A step rolls out `completions` of each of `prompts` prompts of `prompt_tokens` tokens, all of just `new_tokens`
    tokens, drawn at temperature 1, scores them with `reward` and makes one AdamW update; no KL term.
    """

    folder: str
    prompts: int
    completions: int
    prompt_tokens: int
    new_tokens: int
    dtype: str
    device: str

    @property
    def rows(self) -> int:
        return self.prompts * self.completions

    @property
    def network(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        return json.loads((Path(self.folder) / "config.json").read_text())

    def prompt_ids(self, step: int) -> list[list[int]]:
        """The same for every side."""
        rng = np.random.default_rng(step % NUM_BATCHES)
        return rng.integers(LOWEST_ID, self.network["vocab_size"], (self.prompts, self.prompt_tokens)).tolist()


SETTINGS = {
    "ours": r"pages|micro\d+|shared|repeated",
    "trl": r"pages|micro\d+|checkpointing|compiled|continuous|halves",
    "tunix": r"pages|micro\d+",
}


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Nothing that could be learned: a checksum of the ids, so that the completions of a prompt differ."""
    return [sum(map(int, ids)) % 101 / 100 for ids in completion_ids]


def done(turns: Turns, *, tokens: int, grad_norm: float | None, peak: int | None, **more: Any) -> None:
    """Answer with a step's figures: its parts rollout and prepare, which has the rollout within it, are timed.

    Args:
        turns: Of the side.
        tokens: New ones in the loss, of all completions.
        grad_norm: Of all parameters before clipping; None where the side does not tell.
        peak: Bytes of memory so far; None where the system does not tell.
        more: Of a peer's first step: entropy in nats where it knows it, and the batch, for ours to check.
    """
    seconds, rollout, prepare = turns.elapsed(), turns.part("rollout"), turns.part("prepare")
    parts = {"rollout": rollout, "score": prepare - rollout, "train": seconds - prepare}
    turns.done(seconds=seconds, **parts, tokens=tokens, grad_norm=grad_norm, peak=peak, **more)
