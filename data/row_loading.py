"""Items of rows for a training loop: shuffled, mixed, without those that cannot be used, and resumed exactly."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from data.records import BadRow
from data.row_sources import RowSource, TooLong
from data.store import digest

__all__ = ["RowLoader"]


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A place in the data: of each stream, how many rows are past and how many items came of them; and, of the first
    epoch, what was left out and the tally of what was not.
    """

    rows: tuple[int, ...]
    items: tuple[int, ...]
    too_long: int = 0
    bad: int = 0
    first_bad: str | None = None
    tally: tuple[int, ...] = ()


class RowLoader:
    """Iterator over this process's items of each global batch, as lists, or as arrays where `collate` makes them.

    Each epoch has every item once, shuffled anew. A source with weights is mixed instead: items come from its data
    sets in those shares, each repeats at its own pace, and an epoch ends when the first of them is through. Items
    that are too long are left out, and bad rows where the source is to skip them. Batches span epochs; where num_epochs
    ends in the middle of a batch, it is a short one.

    A batch is cut into process_count runs, so it is the same for any number of processes. Each of them reads all of it,
    to know what is left out. `collate` makes all of it a pytree of arrays with rows in front, so that shapes do not
    depend on the process either, and the rows are cut.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        num_epochs: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
        collate: Callable[[list[Any]], Any] | None = None,
    ):
        if not 0 <= process_index < process_count:
            raise ValueError(f"process {process_index} of {process_count}")
        if num_epochs is not None and num_epochs < 1:
            raise ValueError(f"num_epochs must be at least 1, or None for no end, got {num_epochs}")
        self._process_index, self._process_count = process_index, process_count
        self._source, self._seed, self._shuffle, self._collate = source, seed, shuffle, collate
        self._check_shared(batch_size)
        self.batch_size, self.num_epochs = batch_size, num_epochs
        self._sizes = (len(source),) if source.weights is None else source.sizes
        weights = source.weights or (1.0,)
        self._shares = [weight / sum(weights) for weight in weights]
        self._orders: dict[int, tuple[int, Sequence[int]]] = {}
        self._place = self._start
        self.fingerprint = digest([source.fingerprint, seed if shuffle else None])

    def __iter__(self) -> RowLoader:
        return self

    def __next__(self) -> Any:
        items, place = self._walk(self._place, self.batch_size)
        own = self._own(items)
        self._place = place  # last, so that an interrupt loses nothing
        if items:
            return own
        raise StopIteration

    def take(self, count: int) -> Any:
        """Return this process's run of the next items; fewer, or an empty list, where num_epochs ends.

        Raises ValueError where processes cannot share them evenly.
        """
        self._check_shared(count)
        items, place = self._walk(self._place, count)
        own = self._own(items)
        self._place = place
        return own

    @property
    def left_out(self) -> str:
        """A line on what was left out up to here in the first epoch, "" where nothing was."""
        place, unit, parts = self._place, self._source.unit, []
        if place.too_long:
            parts.append(f"{place.too_long:,} {unit} longer than {self._source.max_prompt_length} tokens left out")
        if place.bad:
            parts.append(f"{place.bad:,} bad {unit} skipped, the first {place.first_bad}")
        return "; ".join(parts)

    @property
    def summary(self) -> tuple[str, ...]:
        """Lines on what was left out up to here in the first epoch, and on what the source counts in the items."""
        return tuple(filter(None, (self.left_out, self._source.summary(self._place.tally))))

    def seek(self, items: int) -> None:
        """Go on as if that many items had been taken; those before are read, to know what is left out."""
        if items < 0:
            raise ValueError(f"cannot go to {items} of {self._source.unit}")
        found, place = self._walk(self._start, items)
        if len(found) < items:
            raise ValueError(f"cannot go to {items} of {len(found)} {self._source.unit}")
        self._place = place

    def state(self) -> dict[str, Any]:
        """Return the place in the data as JSON values, the same in every process."""
        place = self._place
        return {
            "rows": list(place.rows),
            self._source.unit: list(place.items),
            "left_out": [place.too_long, place.bad, place.first_bad, *place.tally],
            "batch_size": self.batch_size,
            "data": self.fingerprint,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a place that `state` returned, in a run of any number of processes, without reading what is before it.

        Raises ValueError for a state of other data, another order of them, or another batch size.
        """
        if state["data"] != self.fingerprint:
            raise ValueError(
                f"the saved place is in other {self._source.unit}: data sets, tokenizer, template, system, "
                "max_prompt_length or another limit, weights or seed changed"
            )
        if state["batch_size"] != self.batch_size:
            raise ValueError(
                f"the saved place is in batches of {state['batch_size']} {self._source.unit}, these have "
                f"{self.batch_size}"
            )
        too_long, bad, first_bad, *tally = state["left_out"]
        self._place = _Place(
            rows=tuple(state["rows"]),
            items=tuple(state[self._source.unit]),
            too_long=too_long,
            bad=bad,
            first_bad=first_bad,
            tally=tuple(tally),
        )

    def close(self) -> None:
        """Let go of the epochs' orders; there are no threads to end."""
        self._orders.clear()

    @property
    def _start(self) -> _Place:
        return _Place(rows=(0,) * len(self._sizes), items=(0,) * len(self._sizes))

    def _walk(self, place: _Place, count: int) -> tuple[list[Any], _Place]:
        """Return the next items of all processes behind a place, and the place behind them."""
        found: list[Any] = []
        while len(found) < count:
            due = [share * (sum(place.items) + 1) - past for share, past in zip(self._shares, place.items)]
            item, place = self._next(place, due.index(max(due)))
            if item is None:
                break
            found.append(item)
        return found, place

    def _next(self, place: _Place, stream: int) -> tuple[Any | None, _Place]:
        """Return a stream's next item, None at its end. Raises ValueError where a whole epoch has none.

        A place is behind an item or at the beginning, so that epochs without one are all in one call.
        """
        size, left_out = self._sizes[stream], 0
        while self.num_epochs is None or place.rows[stream] < self.num_epochs * size:
            row = place.rows[stream]
            place = replace(place, rows=_increased(place.rows, stream))
            index = sum(self._sizes[:stream]) + self._order(stream, row // size)[row % size]
            try:
                item = self._source[int(index)]
                tally = _added(place.tally, self._source.tally(item)) if row < size else place.tally
                return item, replace(place, items=_increased(place.items, stream), tally=tally)
            except TooLong as error:
                last, place = error, replace(place, too_long=place.too_long + (row < size))
            except BadRow as error:
                if not self._source.skip_bad:
                    raise
                first = place.first_bad or str(error)
                last, place = error, replace(place, bad=place.bad + (row < size), first_bad=first)
            left_out += 1
            if left_out >= size and (row + 1) % size == 0:
                raise ValueError(f"not one of {size:,} {self._source.unit} can be used, the last: {last}")
        return None, place

    def _order(self, stream: int, epoch: int) -> Sequence[int]:
        if not self._shuffle:
            return range(self._sizes[stream])
        if self._orders.get(stream, (None,))[0] != epoch:
            order = np.random.default_rng((self._seed, stream, epoch)).permutation(self._sizes[stream])
            self._orders[stream] = (epoch, order)
        return self._orders[stream][1]

    def _own(self, items: list[Any]) -> Any:
        if self._collate is None or not items:
            return self._cut(items, len(items))
        batch = self._collate(items)
        count = len(jax.tree.leaves(batch)[0])
        self._check_shared(count)
        return jax.tree.map(lambda array: self._cut(array, count), batch)

    def _cut(self, rows: Any, count: int) -> Any:
        start, stop = (count * i // self._process_count for i in (self._process_index, self._process_index + 1))
        return rows[start:stop]

    def _check_shared(self, count: int) -> None:
        if count < 1 or count % self._process_count:
            unit = self._source.unit
            raise ValueError(f"{count} {unit} cannot be shared evenly by {self._process_count} processes")


def _increased(counts: tuple[int, ...], index: int) -> tuple[int, ...]:
    return (*counts[:index], counts[index] + 1, *counts[index + 1 :])


def _added(counts: tuple[int, ...], others: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(sum, itertools.zip_longest(counts, others, fillvalue=0)))
