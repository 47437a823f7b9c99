"""What the sides of `benchmarks.grpo` are told, and what they answer. Without what is heavy, for any environment."""

import contextlib
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

LEARNING_RATE, MAX_NORM, BETAS, EPSILON = 1e-6, 1.0, (0.9, 0.999), 1e-8
NUM_BATCHES = 64  # of prompts; then the first again
TUNIX_ROPE_THETA = 1_000_000  # whatever its config says
LOWEST_ID = 5  # of prompts, so that no side takes one for padding or a beginning


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """Who is to do what: a key of SIDES, its settings (words of SETTINGS), and, for ours, batches to check."""

    kind: str
    settings: tuple[str, ...]
    work: Work
    checks: tuple[dict, ...] = ()

    def micro(self) -> int:
        """Completions in a micro-batch of the training part."""
        sizes = [int(word.removeprefix("micro")) for word in self.settings if word.startswith("micro")]
        return sizes[-1] if sizes else self.work.rows


SETTINGS = {
    "ours": r"pages|micro\d+|shared|repeated",
    "trl": r"pages|micro\d+|checkpointing|compiled|continuous|halves",
    "tunix": r"pages|micro\d+",
}


def check_settings(kind: str, settings: tuple[str, ...]) -> None:
    """Raise ValueError for a word that is not a setting of this side."""
    for word in settings:
        if not re.fullmatch(SETTINGS[kind], word):
            raise ValueError(f"{word!r} is no setting of {kind}: {SETTINGS[kind].replace('|', ', ')}")


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Nothing that could be learned: a checksum of the ids, so that the completions of a prompt differ."""
    return [sum(map(int, ids)) % 101 / 100 for ids in completion_ids]


class Turns:
    """When the side's next step may begin, and what it says about it afterwards.

    The clock of a step runs from `wait` to `done`; `timed` adds what happens within it to one of its parts.
    """

    def __init__(self, replies: Any):
        self._replies, self._started, self._parts = replies, 0.0, {}
        self.count = 0

    def wait(self) -> None:
        """Until a step is asked for; ends the process where none will be."""
        if not sys.stdin.readline():
            end()
        self._parts, self._started = {"rollout": 0.0, "prepare": 0.0}, time.perf_counter()

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """rollout, or prepare, which has the rollout within it and the scoring behind it."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._parts[part] += seconds
        self.note(f"{part} took {seconds:.2f} s")

    def note(self, text: str) -> None:
        """Tell how far the side has come, between its answers."""
        self.answer({"note": text})

    def answer(self, what: dict[str, Any]) -> None:
        print(json.dumps(what), file=self._replies, flush=True)

    def done(self, *, tokens: int, grad_norm: float | None, peak: int | None, **more: Any) -> None:
        """Answer with the step's figures.

        Args:
            tokens: New ones in the loss, of all completions.
            grad_norm: Of all parameters before clipping; None where the side does not tell.
            peak: Bytes of memory so far; None where the system does not tell.
            more: Of a peer's first step: entropy in nats where it knows it, and the batch, for ours to check.
        """
        seconds = time.perf_counter() - self._started
        rollout, prepare = self._parts["rollout"], self._parts["prepare"]
        parts = {"rollout": rollout, "score": prepare - rollout, "train": seconds - prepare}
        figures = {"seconds": seconds, **parts, "tokens": tokens, "grad_norm": grad_norm, "peak": peak}
        self.answer(figures | more)
        self.count += 1


def end() -> NoReturn:
    """Leave at once: the trainers of the peers are in the middle of a run, some of it in other threads."""
    sys.stderr.flush()
    os._exit(0)


def peak_resident_bytes() -> int | None:
    """Linux's record of this process; None elsewhere."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
    return None
