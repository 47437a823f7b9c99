"""Batches for a training loop: shuffled, mixed, sharded by process, fetched ahead, and resumed exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from data.batch import Batch
from data.packing import PackedRows, padding_row
from data.store import digest

__all__ = ["Loader"]

_FEW = 2000


class Loader:
    """Iterator over this process's rows of each global batch, as a Batch of numpy arrays.

    Batch b is rows b * batch_size to (b + 1) * batch_size of one endless sequence of rows, cut into process_count equal
    runs, so it is the same batch for any number of processes. Batches span epochs; each epoch is shuffled anew. Where
    num_epochs ends in the middle of a batch, it is filled up with rows of padding.

    Several sources: without weights an epoch has every row of each once; with weights rows come from the sources in
    those shares, each source repeats at its own pace, and an epoch ends when the first of them is through.

    threads fetch prefetch batches ahead; with prefetch 0 each batch is made when it is asked for.
    """

    def __init__(
        self,
        sources: Sequence[PackedRows],
        *,
        batch_size: int,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
        num_epochs: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
        threads: int = 2,
        prefetch: int = 4,
    ):
        _check(sources, batch_size, weights, num_epochs, process_index, process_count)
        self.batch_size, self.sources = batch_size, tuple(sources)
        rows = _sequence(sources, seed if shuffle else None, weights, num_epochs)
        self.num_rows = None if num_epochs is None else len(rows)
        self.num_batches = None if num_epochs is None else -(-len(rows) // batch_size)
        if num_epochs is not None and (missing := -len(rows) % batch_size):
            padding = grain.MapDataset.source([padding_row(sources[0].T)] * missing)
            rows = grain.MapDataset.concatenate([rows, padding])
        shards = rows.batch(batch_size // process_count, drop_remainder=True, batch_fn=_stack)
        options = grain.ReadOptions(num_threads=threads if prefetch else 0, prefetch_buffer_size=prefetch)
        self._batches = iter(shards[process_index::process_count].to_iter_dataset(options))
        self._consumed = 0
        shares = None if weights is None else [float(weight) for weight in weights]
        self.fingerprint = digest([[rows.fingerprint for rows in sources], shares, seed if shuffle else None])

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        try:
            batch = next(self._batches)
            self._consumed += 1
        except StopIteration:
            raise
        except BaseException:  # what was fetched ahead no longer begins with the batch that comes next
            self.seek(self._consumed)
            raise
        return batch

    def seek(self, batches: int) -> None:
        """Go on as if that many batches had been consumed."""
        if batches < 0 or (self.num_batches is not None and batches > self.num_batches):
            raise ValueError(f"cannot go to batch {batches} of {self.num_batches}")
        self._batches.set_state({"next_index": batches})
        self._consumed = batches

    def state(self) -> dict[str, Any]:
        """Return the place in the data as JSON values, the same in every process; what is fetched ahead is not past."""
        return {"batches": self._consumed, "batch_size": self.batch_size, "data": self.fingerprint}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a place that `state` returned, in a run of any number of processes, without reading what is before it.

        Raises ValueError for a state of other data, another order of them, or another batch size.
        """
        if state["data"] != self.fingerprint:
            raise ValueError(
                "the saved place is in other data: data sets, tokenizer, packing, row length, weights or seed changed"
            )
        if state["batch_size"] != self.batch_size:
            raise ValueError(
                f"the saved place is in batches of {state['batch_size']} rows, these have {self.batch_size}"
            )
        self.seek(state["batches"])

    def close(self) -> None:
        """End the threads. The loader cannot be used any more."""
        self._batches.close()


def _check(
    sources: Sequence[PackedRows],
    batch_size: int,
    weights: Sequence[float] | None,
    num_epochs: int | None,
    process_index: int,
    process_count: int,
) -> None:
    if not sources:
        raise ValueError("no data to load")
    if len(lengths := {source.T for source in sources}) > 1:
        raise ValueError(f"the sources have rows of different lengths: {sorted(lengths)}")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"a batch of {batch_size} rows cannot be shared evenly by {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} of {process_count}")
    if weights is not None and (len(weights) != len(sources) or not all(0 < weight < np.inf for weight in weights)):
        raise ValueError(f"{len(sources)} sources need as many weights above 0, got {list(weights)}")
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs must be at least 1, or None for no end, got {num_epochs}")


def _sequence(
    sources: Sequence[PackedRows], seed: int | None, weights: Sequence[float] | None, num_epochs: int | None
) -> grain.MapDataset:
    """Return the rows of all processes in their order."""
    parts = [grain.MapDataset.source(source) for source in sources]
    if weights is None:
        return _shuffled(grain.MapDataset.concatenate(parts), seed, 0).repeat(num_epochs)
    parts = [_shuffled(part, seed, index).repeat(num_epochs) for index, part in enumerate(parts)]
    return grain.MapDataset.mix(parts, weights)


def _shuffled(rows: grain.MapDataset, seed: int | None, index: int) -> grain.MapDataset:
    """Shuffle each epoch anew, without a list of the rows."""
    if seed is None:
        return rows
    if len(rows) <= _FEW:
        return grain.MapDataset.select_from_datasets([rows], _FewShuffled(len(rows), (seed, index)))
    # Grain adds the epoch to the seed, so neighbouring seeds are put far apart.
    return rows.shuffle(int(np.random.SeedSequence((seed, index)).generate_state(1)[0]))


class _FewShuffled:
    """The order of few rows, for which Grain's shuffle searches long: milliseconds for one of two rows."""

    def __init__(self, length: int, seed: tuple[int, int]):
        self._length, self._seed = length, seed

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[int, int]:
        epoch, place = divmod(index, self._length)
        order = np.random.default_rng((*self._seed, epoch)).permutation(self._length)
        return 0, epoch * self._length + int(order[place])


def _stack(rows: Sequence[Mapping[str, np.ndarray]]) -> Batch:
    return Batch(**{f"{name}_BT": np.stack([row[name] for row in rows]) for name in rows[0]})
