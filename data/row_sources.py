"""Rows of data sets by number, made into what is trained on when they are asked for; some of them held out."""

from __future__ import annotations

import hashlib
import itertools
import string
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from data.chat_guard import ChatTokenizer
from data.datasets import SourceConfig, SourcesConfig
from data.readers import Rows, data_files, open_rows
from data.records import BadRow
from data.records_messages import Message
from data.store import digest

__all__ = [
    "Kind",
    "Part",
    "RowSource",
    "RowsConfig",
    "TooLong",
    "check_first_rows",
    "naming_row",
    "open_parts",
    "with_system",
]


@dataclass(frozen=True, kw_only=True)
class RowsConfig(SourcesConfig):
    """What is trained and validated on, row by row: what the settings of all such data have in common.

    `system` is put in front of conversations without a system message.
    """

    max_prompt_length: int
    system: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be positive, not {self.max_prompt_length}")
        for source in (*self.train_sources, *self.validation_sources):
            if source.token_dtype is not None:
                raise ValueError(f"token_dtype {source.token_dtype!r} of {source.path}: tokens are no prompts")


class TooLong(ValueError):  # noqa: N818
    """A row with more tokens than it may have."""


class Kind(NamedTuple):
    """What the rows of a data set are called, and how many items each is made into."""

    name: str
    per_row: int = 1


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of a data set: those of the indices, all where that is None. Its length is in items."""

    rows: Rows
    config: SourceConfig
    kind: Kind
    indices: np.ndarray | None
    fingerprint: str

    def __len__(self) -> int:
        return self.num_rows * self.kind.per_row

    @property
    def num_rows(self) -> int:
        return len(self.rows) if self.indices is None else len(self.indices)

    def place(self, index: int) -> tuple[int, int]:
        """Return the row that an item is of, and which of its items that is."""
        row, which = divmod(index, self.kind.per_row)
        return (row if self.indices is None else int(self.indices[row])), which


class RowSource(ABC):
    """Items by number, one data set's after the other's; each is read and tokenised when it is asked for.

    unit is what items are called. sizes has the number of items of each data set, weights their shares where they are
    mixed. The fingerprint changes with all that decides which items there are; to skip bad rows from now on changes
    none of those before.
    """

    unit: str
    fingerprint: str

    def __init__(self, parts: Sequence[Part], *, config: RowsConfig, weights: tuple[float, ...] | None = None):
        self.sizes, self.weights = tuple(map(len, parts)), weights
        self.max_prompt_length, self.skip_bad = config.max_prompt_length, config.on_bad_row == "skip"
        self._parts, self._ends = tuple(parts), list(itertools.accumulate(self.sizes))
        self._system = config.system

    def __len__(self) -> int:
        return self._ends[-1]

    @abstractmethod
    def __getitem__(self, index: int) -> Any:
        """Raises BadRow, "path:line: why", for a row that cannot be used, TooLong for one that is to be left out."""

    def tally(self, item: Any) -> tuple[int, ...]:
        """What is counted of an item, to be added up; nothing by default."""
        return ()

    def summary(self, tally: tuple[int, ...]) -> str:
        """A line on the sum of the tallies of some items, "" where there is nothing to say."""
        return ""

    def where(self, index: int) -> str:
        """Where an item's row is, as path:line."""
        part, row, _ = self._place(index)
        return part.rows.where(row)

    def _place(self, index: int) -> tuple[Part, int, int]:
        """Return the data set of an item, the row that it is of, and which of the row's items it is."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)} {self.unit}")
        number = bisect_right(self._ends, index)
        part = self._parts[number]
        return part, *part.place(index - self._ends[number] + len(part))

    def _made_by(self, tokenizer: ChatTokenizer, template: str | None) -> list[Any]:
        """Return, for a fingerprint, the rows, and what makes text and tokens of them."""
        special = sorted(tokenizer.special_tokens.items())
        made_by = [tokenizer.encode(string.printable), special, template, self._system]
        return [[part.fingerprint for part in self._parts], made_by]


def open_parts(
    config: RowsConfig, *, seed: int, kind: Callable[[Rows, SourceConfig], Kind]
) -> tuple[list[Part], list[Part], tuple[str, ...]]:
    """Index the data sets; return those to train on, those held out or to validate on, and a line on each.

    Raises FileNotFoundError and ValueError, in one line that names the data set, for what is missing, empty or bad.
    """
    train, held, report = [], [], []
    for number, source in enumerate(config.train_sources):
        part = _open(source, kind)
        report.append(_line(part))
        if config.validation_fraction:
            part, out = _split(part, config.validation_fraction, (seed, number))
            held.append(out)
            report[-1] += f"; {out.num_rows:,} of them held out"
        train.append(part)
    for source in config.validation_sources:
        held.append(_open(source, kind))
        report.append(f"{_line(held[-1])} to validate on")
    return train, held, tuple(report)


def check_first_rows(*sources: RowSource | None) -> None:
    """Read the first row of each data set. Raises BadRow where it is bad."""
    for source in filter(None, sources):
        for end, size in zip(itertools.accumulate(source.sizes), source.sizes):
            try:
                source[end - size]
            except TooLong:
                continue


@contextmanager
def naming_row(rows: Rows, row: int) -> Iterator[None]:
    """Raise what is wrong with a row as BadRow, "path:line: why"."""
    try:
        yield
    except BadRow:
        raise
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{rows.where(row)}: {' '.join(str(error).split())}") from error


def with_system(prompt: str | tuple[Message, ...], system: str | None) -> str | tuple[Message, ...]:
    """Put a system message in front of a conversation that has none. Raises ValueError for plain text."""
    if system is None:
        return prompt
    if isinstance(prompt, str):
        raise ValueError("system needs a conversation, and the prompt is plain text")
    has_one = prompt[0]["role"] in ("system", "developer")
    return prompt if has_one else ({"role": "system", "content": system}, *prompt)


def _open(source: SourceConfig, kind: Callable[[Rows, SourceConfig], Kind]) -> Part:
    rows = open_rows(source.path, split=source.split, unit=source.unit)
    contents = []
    for path in data_files(source.path):
        with path.open("rb") as file:
            contents.append(hashlib.file_digest(file, "blake2b").hexdigest())
    content = contents or rows.fingerprint  # that of a Hugging Face data set
    fingerprint = digest([content, source.unit, source.format])
    return Part(rows=rows, config=source, kind=kind(rows, source), indices=None, fingerprint=fingerprint)


def _line(part: Part) -> str:
    return f"{part.config.path}: {part.num_rows:,} rows of {part.kind.name}"


def _split(part: Part, fraction: float, seed: tuple[int, int]) -> tuple[Part, Part]:
    """Hold out a part of the rows, drawn at random and at least one: return the larger part and the one held out."""
    held = max(1, round(fraction * part.num_rows))
    if held >= part.num_rows:
        raise ValueError(f"{part.config.path}: holding out {fraction} of {part.num_rows} rows leaves none")
    order = np.random.default_rng(seed).permutation(part.num_rows)
    kept, out = (
        replace(part, indices=np.sort(indices), fingerprint=digest([part.fingerprint, fraction, seed, name]))
        for name, indices in (("kept", order[held:]), ("held out", order[:held]))
    )
    return kept, out
