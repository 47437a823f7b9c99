"""Data sets by name to rows of tokens: what to read, how to tokenise it, how to pack it, what to hold out."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data.chat_spans import SpanTokenizer
from data.examples import Example, tokenize
from data.packing import PACKINGS, PackedRows
from data.readers import data_files, open_rows, read_record
from data.records import BadRow, TextRecord
from data.store import TokenStore, open_bin, split
from data.store_build import open_or_build, store_key

__all__ = ["DataConfig", "Datasets", "SourceConfig", "SourcesConfig", "open_datasets", "texts"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One data set: a path, a pattern or the name of a Hugging Face data set, as in `data.readers.open_rows`.

    `weight` is its share in a mixture; a mixture without weights has every row of every set once an epoch. `unit` is
    how text files are cut into documents, `format` that of ambiguous rows, `token_dtype` that of a .bin file.
    """

    path: str
    weight: float | None = None
    split: str | None = None
    unit: Literal["file", "line", "paragraph"] = "file"
    format: str | None = None
    token_dtype: Literal["uint16", "uint32"] | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("the path of a data set is empty")
        if self.weight is not None and not self.weight > 0:
            raise ValueError(f"the weight {self.weight} of {self.path} must be positive")


@dataclass(frozen=True, kw_only=True)
class SourcesConfig:
    """The data sets that are trained and validated on, and how their rows are read: what all such settings have.

    `validation`, or a `validation_fraction` of each training set, held out. `chat_template` is a built-in name or a
    file, by default the tokenizer's own.
    """

    train: str | tuple[str | SourceConfig, ...]
    validation: str | tuple[str | SourceConfig, ...] = ()
    validation_fraction: float = 0.0
    chat_template: str | None = None
    on_bad_row: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("train names no data set")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction {self.validation_fraction} must be at least 0 and below 1")
        for source in self.validation_sources:
            if source.weight is not None:
                raise ValueError(f"the weight {source.weight} of {source.path} is for training, not for validation")
        if self.validation and self.validation_fraction:
            raise ValueError(f"validation {self.validation!r} and validation_fraction exclude each other")

    @property
    def train_sources(self) -> tuple[SourceConfig, ...]:
        return _sources(self.train)

    @property
    def validation_sources(self) -> tuple[SourceConfig, ...]:
        return _sources(self.validation)

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The shares of the training sets, None where none is given."""
        weights = [source.weight for source in self.train_sources]
        return None if all(w is None for w in weights) else tuple(1.0 if w is None else w for w in weights)


@dataclass(frozen=True, kw_only=True)
class DataConfig(SourcesConfig):
    """What is trained and validated on, packed into rows.

    A row has `sequence_length` places. `packing`: best_fit keeps documents whole, concat cuts the stream of them, none
    gives each a row of its own. Tokens are kept in `cache_dir`, None for the user's cache.
    """

    sequence_length: int
    packing: Literal["best_fit", "concat", "none"]
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_length < 1:
            raise ValueError(f"sequence_length must be positive, not {self.sequence_length}")
        if self.packing not in PACKINGS:
            raise ValueError(f"packing {self.packing!r} is none of {', '.join(PACKINGS)}")


@dataclass(frozen=True, kw_only=True)
class Datasets:
    """Packed rows to train and to validate on; `report` has a line on each data set.

    `weights` are the shares of the rows to train on, None where they are all taken once an epoch.
    """

    train: tuple[PackedRows, ...]
    weights: tuple[float, ...] | None
    validation: tuple[PackedRows, ...]
    report: tuple[str, ...]


def open_datasets(
    config: DataConfig,
    tokenizer: SpanTokenizer,
    *,
    tokenizer_name: str,
    template: str | None,
    learn_all: bool,
    seed: int,
    cache_dir: str | Path,
) -> Datasets:
    """Tokenise what is not in `cache_dir` yet, hold out what is to be held out, and pack.

    With `learn_all` prompts and users' turns are learnt too, as running text is. `tokenizer_name` changes whenever the
    tokenizer does. Raises FileNotFoundError and ValueError, in one line that names the data set, for what is missing,
    empty or bad.
    """
    train, weights, validation, report = [], [], [], []

    def opened(source: SourceConfig) -> list[TokenStore]:
        return _open(source, config, tokenizer, tokenizer_name, template, learn_all, Path(cache_dir))

    for source, weight in zip(config.train_sources, config.weights or itertools.repeat(1.0)):
        stores = opened(source)
        tokens = sum(store.num_tokens for store in stores)
        for store in stores:
            weights.append(weight * store.num_tokens / tokens)
            report.append(_line(store))
            if config.validation_fraction:
                store, held = split(store, config.validation_fraction, seed=seed)
                validation.append(_pack(held, config))
                report[-1] += f"; {held.num_tokens:,} tokens held out"
            train.append(_pack(store, config))
    for source in config.validation_sources:
        for store in opened(source):
            report.append(_line(store))
            validation.append(_pack(store, config))
    return Datasets(
        train=tuple(train),
        weights=None if config.weights is None else tuple(weights),
        validation=tuple(validation),
        report=tuple(report),
    )


def texts(sources: Sequence[SourceConfig], *, skip_bad: bool = False) -> Iterator[str]:
    """All texts of text data sets, piece by piece. Raises ValueError for a row that is no plain text."""
    for source in sources:
        rows = open_rows(source.path, split=source.split, unit=source.unit)
        for index in range(len(rows)):
            try:
                record = read_record(rows, index, format=source.format)
            except BadRow:
                if not skip_bad:
                    raise
                continue
            if not isinstance(record, TextRecord):
                raise ValueError(f"{rows.where(index)}: a character tokenizer is made of plain text alone")
            yield record.text


def _sources(sources: str | tuple[str | SourceConfig, ...]) -> tuple[SourceConfig, ...]:
    sources = (sources,) if isinstance(sources, str) else sources
    return tuple(SourceConfig(path=source) if isinstance(source, str) else source for source in sources if source)


def _open(
    source: SourceConfig,
    config: DataConfig,
    tokenizer: SpanTokenizer,
    tokenizer_name: str,
    template: str | None,
    learn_all: bool,
    cache_dir: Path,
) -> list[TokenStore]:
    """The tokens of a source; of a pattern of .bin files those of each file."""
    if source.path.endswith(".bin"):
        for name, usual in (("split", None), ("unit", "file"), ("format", None)):
            if (value := getattr(source, name)) != usual:
                raise ValueError(f"{name} {value!r} means nothing to {source.path}, a file of tokens")
        vocab_size, eos_id = tokenizer.vocab_size, tokenizer.eos_id
        paths = data_files(source.path)
        return [open_bin(path, vocab_size=vocab_size, dtype=source.token_dtype, eos_id=eos_id) for path in paths]
    if source.token_dtype is not None:
        raise ValueError(f"token_dtype {source.token_dtype!r} is for .bin files, and {source.path} is none")
    max_length = None if config.packing == "concat" else config.sequence_length + 1
    files = data_files(source.path)
    rows = functools.cache(lambda: open_rows(source.path, split=source.split, unit=source.unit))

    def tokenized(index: int) -> Example:
        example = tokenize(read_record(rows(), index, format=source.format), tokenizer, template=template)
        return example._replace(mask=np.ones_like(example.mask)) if learn_all else example

    settings = asdict(source) | {"weight": None, "tokenizer": tokenizer_name, "template": template}
    settings |= {"max_length": max_length, "on_bad_row": config.on_bad_row, "learn_all": learn_all}
    settings |= {} if files else {"data_set": rows().fingerprint}
    store = open_or_build(
        cache_dir,
        store_key(files, **settings),
        lambda: _Numbers(rows()),
        tokenize=tokenized,
        vocab_size=tokenizer.vocab_size,
        name=source.path,
        max_length=max_length,
        skip_bad=config.on_bad_row == "skip",
    )
    return [store]


class _Numbers:
    """The numbers of rows in the place of the rows themselves, which are read where they are tokenised."""

    def __init__(self, rows):
        self._rows = rows
        self.where = rows.where

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> int:
        return index


def _pack(store: TokenStore, config: DataConfig) -> PackedRows:
    return PACKINGS[config.packing](store, config.sequence_length)


def _line(store: TokenStore) -> str:
    counts = store.counts
    line = f"{store.name}: {counts.documents:,} documents, {counts.tokens:,} tokens, {counts.learnt_tokens:,} learnt"
    for count, what in (
        (counts.truncated, "cut to the length of a row"),
        (counts.dropped_empty, "dropped for want of anything to learn"),
        (counts.skipped_bad, f"bad rows skipped, the first {counts.first_bad}"),
    ):
        line += f"; {count:,} {what}" if count else ""
    return line
