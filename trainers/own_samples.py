"""A student's own completions as rows to learn from, drawn at the step that learns from them.

Letters as in `data.batch`; M are the tokens of a completion.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from data.batch import Batch
from data.prompts import Prompt
from trainers.metrics import Throughput
from trainers.rollouts import RollOut, Rollout
from trainers.trainer import cast

_SMALLEST = 16  # rows are as long as powers of two from here on, so that there are few sizes to compile for


class OwnSamples:
    """Decides which steps learn from the student's completions of `prompts`, and draws them.

    A step does with probability `share`; that, and what is drawn, follows from the seed and the step alone. `roll_out`
    draws a number of completions of each prompt; rows are up to `max_length` long. The student draws in
    `compute_dtype`, None for its own.
    """

    def __init__(
        self,
        roll_out: RollOut,
        prompts: Iterator[list[Prompt]],
        *,
        share: float,
        seed: int,
        max_length: int,
        compute_dtype: Any = None,
    ):
        self._roll_out, self._prompts = roll_out, prompts
        self._share, self._seed, self._max_length = share, seed, max_length
        self._cast = jax.jit(lambda model: cast(model, compute_dtype))

    def wanted(self, step: int) -> bool:
        """Whether the step after so many learns from them."""
        return np.random.default_rng((self._seed, step)).random() < self._share

    def draw(self, model: nnx.Module, step: int, throughput: Throughput) -> tuple[Batch, Mapping[str, float]]:
        """Rows of the next prompts with their completions, and metrics of these.

        Where drawing fails, the prompts are given back to the data, if they come from a loader.
        """
        place = self._prompts.state() if hasattr(self._prompts, "state") else None
        with throughput.waiting():
            prompts = next(self._prompts)
        numbers = range(step * len(prompts), (step + 1) * len(prompts))
        try:
            with throughput.section("rollout"):
                rollout = self._roll_out(self._cast(model), [prompt.ids for prompt in prompts], numbers)
        except BaseException:
            if place is not None:
                self._prompts.restore(place)
            raise
        batch = rows_of(prompts, rollout, max_length=self._max_length)
        throughput.add_step(tokens=int((batch.segments_BT > 0).sum()))
        return batch, {
            "on_policy": 1.0,
            "completions/mean_length": float(rollout.count_B.mean()),
            "completions/clipped_ratio": float(np.mean(~rollout.stopped_B)),
        }


def rows_of(prompts: Sequence[Prompt], rollout: Rollout, *, max_length: int) -> Batch:
    """A row for each completion behind its prompt; tokens of the completion, with one that stops it, are learnt."""
    C = len(rollout.count_B) // len(prompts)
    owners = [prompt.ids for prompt in prompts for _ in range(C)]
    longest = max(len(ids) + int(count) for ids, count in zip(owners, rollout.count_B)) - 1
    T = min(max(_SMALLEST, 1 << (longest - 1).bit_length()), max_length)
    fields = {name: np.zeros((len(owners), T), np.int32) for name in ("tokens", "targets", "segments", "positions")}
    weights_BT = np.zeros((len(owners), T), np.float32)
    for row, (ids, tokens_M, count) in enumerate(zip(owners, rollout.tokens_BM, rollout.count_B)):
        text = np.concatenate([np.asarray(ids, np.int32), tokens_M[:count]])
        here = row, slice(0, len(text) - 1)
        fields["tokens"][here], fields["targets"][here] = text[:-1], text[1:]
        fields["segments"][here], fields["positions"][here] = 1, np.arange(len(text) - 1)
        weights_BT[row, len(ids) - 1 : len(text) - 1] = 1
    return Batch(**{f"{name}_BT": own for name, own in fields.items()}, weights_BT=weights_BT)
