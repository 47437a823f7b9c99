"""Plans that lay documents out in rows of T places, known before a token is read.

A document of n tokens takes n - 1 places, one for each token that has a next one. Every document in a row is a segment
of its own, with positions from 0; the first token of a document is nobody's target.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import numpy as np

from data.store import TokenStore, digest

__all__ = ["PACKINGS", "PackedRows", "best_fit", "concat", "one_each"]


class PackedRows(abc.ABC):
    """Rows of T places over the documents of a store: by number, dicts of [T] arrays that are the fields of a Batch.

    num_places counts the places of an epoch that hold a real token, efficiency is their share.
    """

    def __init__(self, store: TokenStore, T: int, name: str, num_places: int, num_rows: int):
        if not num_rows:
            raise ValueError(f"{store.name}: no document has two tokens, so there is nothing to predict")
        self.store, self.T = store, T
        self.num_places, self._num_rows = num_places, num_rows
        self.fingerprint = digest([store.fingerprint, name, T])

    @abc.abstractmethod
    def _pieces(self, row: int) -> Iterator[tuple[int, int]]:
        """Yield the pieces of documents in a row: where in the store's tokens each starts, and its places."""

    @property
    def efficiency(self) -> float:
        return self.num_places / (len(self) * self.T)

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        fields = padding_row(self.T)
        place = 0
        for segment, (start, places) in enumerate(self._pieces(row), 1):
            here = slice(place, place + places)
            tokens, mask = self.store.read(start, start + places + 1)
            fields["tokens"][here], fields["targets"][here] = tokens[:-1], tokens[1:]
            fields["weights"][here] = mask[1:]
            fields["segments"][here] = segment
            fields["positions"][here] = np.arange(places)
            place += places
        return fields


def padding_row(T: int) -> dict[str, np.ndarray]:
    """Return a row that holds no document."""
    fields = {name: np.zeros(T, np.int32) for name in ("tokens", "targets", "segments", "positions")}
    return fields | {"weights": np.zeros(T, np.float32)}


def best_fit(store: TokenStore, T: int) -> PackedRows:
    """Pack whole documents, the longest first, each into the fullest row that has the space.

    Raises ValueError for a document that is longer than a row.
    """
    places = _whole_places(store, T, "best_fit")
    order, bounds = _fit(places, T)
    return _WholeRows(store, T, "best_fit", places, order, bounds)


def one_each(store: TokenStore, T: int) -> PackedRows:
    """Give each document a row of its own. Raises ValueError for a document that is longer than a row."""
    places = _whole_places(store, T, "none")
    order = np.flatnonzero(places)
    return _WholeRows(store, T, "none", places, order, np.arange(len(order) + 1))


def concat(store: TokenStore, T: int) -> PackedRows:
    """Lay the documents end to end and cut the stream every T places; what a cut splits goes on in the next row."""
    return _ConcatRows(store, T)


PACKINGS: Mapping[str, Callable[[TokenStore, int], PackedRows]] = MappingProxyType(
    {"best_fit": best_fit, "concat": concat, "none": one_each}
)


class _WholeRows(PackedRows):
    """Row r holds the documents order[bounds[r]:bounds[r + 1]]."""

    def __init__(self, store: TokenStore, T: int, name: str, places: np.ndarray, order: np.ndarray, bounds: np.ndarray):
        super().__init__(store, T, name, int(places.sum()), len(bounds) - 1)
        self._order, self._bounds = order, bounds

    def _pieces(self, row: int) -> Iterator[tuple[int, int]]:
        for document in self._order[self._bounds[row] : self._bounds[row + 1]]:
            yield int(self.store.starts[document]), int(self.store.lengths[document]) - 1


class _ConcatRows(PackedRows):
    """Row r holds the places [r T, (r + 1) T) of the documents laid end to end; document d ends before _ends[d]."""

    def __init__(self, store: TokenStore, T: int):
        self._ends = np.cumsum(_places(store, T))
        total = int(self._ends[-1]) if len(self._ends) else 0
        super().__init__(store, T, "concat", total, -(-total // T))

    def _pieces(self, row: int) -> Iterator[tuple[int, int]]:
        first, stop = row * self.T, min((row + 1) * self.T, self.num_places)
        document = int(np.searchsorted(self._ends, first, side="right"))
        while first < stop:
            end = int(self._ends[document])
            if end > first:
                offset = int(self.store.lengths[document]) - 1 - (end - first)
                yield int(self.store.starts[document]) + offset, min(stop, end) - first
                first = min(stop, end)
            document += 1


def _places(store: TokenStore, T: int) -> np.ndarray:
    if T < 1:
        raise ValueError(f"rows need at least one place, got {T}")
    return np.maximum(store.lengths - 1, 0)


def _whole_places(store: TokenStore, T: int, name: str) -> np.ndarray:
    places = _places(store, T)
    if len(places) and (longest := int(places.max())) > T:
        raise ValueError(
            f"{store.name}: packing {name!r} keeps documents whole, and document {int(places.argmax())} of "
            f"{longest + 1} tokens does not fit a row of {T}; cut documents to {T + 1} tokens, or pack with 'concat'"
        )
    return places


def _fit(places: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Best fit, decreasing. Return the documents in the order of their rows, and where in it each row begins.

    All documents of one size are placed at once, in O(n log n + T log T) steps of numpy.
    """
    order = np.argsort(-places, kind="stable")[: np.count_nonzero(places)]
    sizes = places[order]
    begins = np.flatnonzero(np.diff(sizes, prepend=-1))
    row_of = np.empty(len(order), np.int64)
    shelves = _Shelves(T)
    for begin, end in zip(begins, [*begins[1:], len(order)]):
        row_of[begin:end] = shelves.place(int(sizes[begin]), int(end - begin))
    by_row = np.argsort(row_of, kind="stable")
    return order[by_row], np.searchsorted(row_of[by_row], np.arange(shelves.num_rows + 1))


class _Shelves:
    """Open rows by the space left in them."""

    def __init__(self, T: int):
        self.num_rows = 0
        self._rows: list[list[np.ndarray]] = [[] for _ in range(T + 1)]
        self._occupied = np.zeros(T + 1, bool)

    def place(self, size: int, count: int) -> np.ndarray:
        """Place documents of one size, and return the row of each.

        The fullest row with the space takes as many as it can: with one more inside it is still the fullest.
        """
        taken: list[np.ndarray] = []
        for space in (size + np.flatnonzero(self._occupied[size:])).tolist():
            if not count:
                break
            rows = np.concatenate(self._rows[space])
            self._rows[space], self._occupied[space] = [], False
            taken.append(self._fill(rows, space, size, count))
            count -= len(taken[-1])
        if count:
            T = len(self._rows) - 1
            rows = self.num_rows + np.arange(-(-count // (T // size)))
            self.num_rows += len(rows)
            taken.append(self._fill(rows, T, size, count))
        return np.concatenate(taken)

    def _fill(self, rows: np.ndarray, space: int, size: int, count: int) -> np.ndarray:
        each = space // size
        count = min(count, each * len(rows))
        full, rest = divmod(count, each)
        self._put(space - each * size, rows[:full])
        self._put(space - rest * size, rows[full : full + bool(rest)])
        self._put(space, rows[full + bool(rest) :])
        return np.repeat(rows[: full + 1], each)[:count]

    def _put(self, space: int, rows: np.ndarray) -> None:
        if space and len(rows):
            self._rows[space].append(rows)
            self._occupied[space] = True
