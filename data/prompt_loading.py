"""Prompts for a training loop: shuffled, mixed, without those that cannot be used, and resumed exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data.prompts import Prompt, PromptSource, TooLong
from data.records import BadRow
from data.store import digest

__all__ = ["PromptLoader"]


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A place in the data: of each stream, how many rows are past and how many prompts came of them; and what was left
    out in the first epoch.
    """

    rows: tuple[int, ...]
    prompts: tuple[int, ...]
    too_long: int = 0
    bad: int = 0
    first_bad: str | None = None


class PromptLoader:
    """Iterator over this process's prompts of each global batch, as lists.

    Each epoch has every prompt once, shuffled anew. A source with weights is mixed instead: prompts come from its data
    sets in those shares, each repeats at its own pace, and an epoch ends when the first of them is through. Prompts
    that are too long are left out, and bad rows where the source is to skip them. Batches span epochs; where num_epochs
    ends in the middle of a batch, it is a short one.

    A batch is cut into process_count runs, so it is the same for any number of processes. Each of them reads all of it,
    to know what is left out.
    """

    def __init__(
        self,
        source: PromptSource,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        num_epochs: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if not 0 <= process_index < process_count:
            raise ValueError(f"process {process_index} of {process_count}")
        if num_epochs is not None and num_epochs < 1:
            raise ValueError(f"num_epochs must be at least 1, or None for no end, got {num_epochs}")
        self._process_index, self._process_count = process_index, process_count
        self._check_shared(batch_size)
        self.batch_size, self.num_epochs = batch_size, num_epochs
        self._source, self._seed, self._shuffle = source, seed, shuffle
        self._sizes = (len(source),) if source.weights is None else source.sizes
        weights = source.weights or (1.0,)
        self._shares = [weight / sum(weights) for weight in weights]
        self._orders: dict[int, tuple[int, Sequence[int]]] = {}
        self._place = self._start
        self.fingerprint = digest([source.fingerprint, seed if shuffle else None])

    def __iter__(self) -> PromptLoader:
        return self

    def __next__(self) -> list[Prompt]:
        prompts, place = self._walk(self._place, self.batch_size)
        own = self._own(prompts)
        self._place = place  # last, so that an interrupt loses nothing
        if prompts:
            return own
        raise StopIteration

    def take(self, count: int) -> list[Prompt]:
        """Return this process's run of the next prompts; fewer, or none, where num_epochs ends.

        Raises ValueError where processes cannot share them evenly.
        """
        self._check_shared(count)
        prompts, place = self._walk(self._place, count)
        own = self._own(prompts)
        self._place = place
        return own

    @property
    def left_out(self) -> str:
        """A line on what was left out up to here in the first epoch, "" where nothing was."""
        place, parts = self._place, []
        if place.too_long:
            parts.append(f"{place.too_long:,} prompts longer than {self._source.max_prompt_length} tokens left out")
        if place.bad:
            parts.append(f"{place.bad:,} bad rows skipped, the first {place.first_bad}")
        return "; ".join(parts)

    def seek(self, prompts: int) -> None:
        """Go on as if that many prompts had been taken; those before are read, to know what is left out."""
        if prompts < 0:
            raise ValueError(f"cannot go to prompt {prompts}")
        found, place = self._walk(self._start, prompts)
        if len(found) < prompts:
            raise ValueError(f"cannot go to prompt {prompts} of {len(found)}")
        self._place = place

    def state(self) -> dict[str, Any]:
        """Return the place in the data as JSON values, the same in every process."""
        place = self._place
        return {
            "rows": list(place.rows),
            "prompts": list(place.prompts),
            "left_out": [place.too_long, place.bad, place.first_bad],
            "batch_size": self.batch_size,
            "data": self.fingerprint,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a place that `state` returned, in a run of any number of processes, without reading what is before it.

        Raises ValueError for a state of other data, another order of them, or another batch size.
        """
        if state["data"] != self.fingerprint:
            raise ValueError(
                "the saved place is in other prompts: data sets, tokenizer, template, system, max_prompt_length, "
                "weights or seed changed"
            )
        if state["batch_size"] != self.batch_size:
            raise ValueError(
                f"the saved place is in batches of {state['batch_size']} prompts, these have {self.batch_size}"
            )
        too_long, bad, first_bad = state["left_out"]
        rows, prompts = tuple(state["rows"]), tuple(state["prompts"])
        self._place = _Place(rows=rows, prompts=prompts, too_long=too_long, bad=bad, first_bad=first_bad)

    def close(self) -> None:
        """Let go of the epochs' orders; there are no threads to end."""
        self._orders.clear()

    @property
    def _start(self) -> _Place:
        return _Place(rows=(0,) * len(self._sizes), prompts=(0,) * len(self._sizes))

    def _walk(self, place: _Place, count: int) -> tuple[list[Prompt], _Place]:
        """Return the next prompts of all processes behind a place, and the place behind them."""
        found: list[Prompt] = []
        while len(found) < count:
            due = [share * (sum(place.prompts) + 1) - past for share, past in zip(self._shares, place.prompts)]
            prompt, place = self._next(place, due.index(max(due)))
            if prompt is None:
                break
            found.append(prompt)
        return found, place

    def _next(self, place: _Place, stream: int) -> tuple[Prompt | None, _Place]:
        """Return a stream's next prompt, None at its end. Raises ValueError where a whole epoch has none.

        A place is behind a prompt or at the beginning, so that epochs without one are all in one call.
        """
        size, left_out = self._sizes[stream], 0
        while self.num_epochs is None or place.rows[stream] < self.num_epochs * size:
            row = place.rows[stream]
            place = replace(place, rows=_increased(place.rows, stream))
            index = sum(self._sizes[:stream]) + self._order(stream, row // size)[row % size]
            try:
                prompt = self._source[int(index)]
                return prompt, replace(place, prompts=_increased(place.prompts, stream))
            except TooLong as error:
                last, place = error, replace(place, too_long=place.too_long + (row < size))
            except BadRow as error:
                if not self._source.skip_bad:
                    raise
                first = place.first_bad or str(error)
                last, place = error, replace(place, bad=place.bad + (row < size), first_bad=first)
            left_out += 1
            if left_out >= size and (row + 1) % size == 0:
                raise ValueError(f"not one of {size:,} prompts can be used, the last: {last}")
        return None, place

    def _order(self, stream: int, epoch: int) -> Sequence[int]:
        if not self._shuffle:
            return range(self._sizes[stream])
        if self._orders.get(stream, (None,))[0] != epoch:
            order = np.random.default_rng((self._seed, stream, epoch)).permutation(self._sizes[stream])
            self._orders[stream] = (epoch, order)
        return self._orders[stream][1]

    def _own(self, prompts: list[Prompt]) -> list[Prompt]:
        start, stop = (len(prompts) * i // self._process_count for i in (self._process_index, self._process_index + 1))
        return prompts[start:stop]

    def _check_shared(self, count: int) -> None:
        if count < 1 or count % self._process_count:
            raise ValueError(f"{count} prompts cannot be shared evenly by {self._process_count} processes")


def _increased(counts: tuple[int, ...], index: int) -> tuple[int, ...]:
    return (*counts[:index], counts[index] + 1, *counts[index + 1 :])
