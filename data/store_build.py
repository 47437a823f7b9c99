"""Write the token store of a data set: in a stream, and whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from data.examples import Example
from data.records import BadRow
from data.store import FORMAT, MASK, META, OFFSETS, TOKENS, Counts, TokenStore, digest, token_dtype

__all__ = ["build", "open_or_build", "store_key"]

_Row = TypeVar("_Row")
_CLAIM = "claim"


class RandomAccess(Protocol[_Row]):
    """Rows by index. where, if there is one, says for messages which row that is, as path:line."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> _Row: ...


def store_key(paths: Iterable[str | Path], **settings: Any) -> str:
    """Return a name for the tokens of some files or folders under some settings, which are JSON values.

    It changes with the path, size and modification time of every file. The settings are all else that the tokens depend
    on: a fingerprint of the tokenizer, the chat template, max_length.
    """
    files = [file for path in map(Path, paths) for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    stats = [(str(file.absolute()), file.stat()) for file in files if not file.is_dir()]
    sources = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return digest({"format": FORMAT, "sources": sources, "settings": settings})


def open_or_build(
    cache_dir: str | Path, key: str, rows: Callable[[], Iterable[_Row] | RandomAccess[_Row]], **options: Any
) -> TokenStore:
    """Open the store of that key, or build it; rows is called for the latter alone, options are those of `build`."""
    folder = Path(cache_dir) / key
    if (folder / META).is_file():
        return TokenStore.open(folder, name=options.get("name"))
    return build(rows(), folder=folder, **options)


def build(
    rows: Iterable[_Row] | RandomAccess[_Row],
    *,
    tokenize: Callable[[_Row], Example],
    folder: str | Path,
    vocab_size: int,
    name: str | None = None,
    max_length: int | None = None,
    skip_bad: bool = False,
) -> TokenStore:
    """Tokenise rows into a new folder, in a stream, and open it; the folder appears when everything is in it.

    Documents are cut to max_length tokens on the right; those that then have no token to learn are dropped. name is the
    data set's in messages. With skip_bad, rows of which tokenize (or the source, asked by index) raises ValueError are
    left out and counted. Raises ValueError for a data set of which nothing is left, for a token id that is not below
    vocab_size, and for a folder that holds another store.
    """
    folder = Path(folder)
    name = name or str(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beginning = f".{folder.name[:32]}."
    _sweep(folder.parent, beginning)
    unfinished = folder.parent / f"{beginning}{uuid.uuid4().hex}.tmp"
    unfinished.mkdir()
    try:
        with _claimed(unfinished), contextlib.closing(_Writer(unfinished, vocab_size, max_length)) as writer:
            counts = _consume(rows, tokenize, writer, skip_bad)
            if not counts.documents:
                raise ValueError(f"{name}: nothing to learn: {_fate(counts)}")
            writer.finish(counts)
        _publish(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return TokenStore.open(folder, name=name)


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Hold a lock in a folder, that ends with the process however the process ends."""
    claim = folder / _CLAIM
    with claim.with_suffix(".new").open("wb") as file:
        with contextlib.suppress(OSError):  # where locks are not supported, nobody sweeps
            fcntl.flock(file, fcntl.LOCK_EX)
            Path(file.name).rename(claim)
        yield
        for path in (claim, Path(file.name)):
            path.unlink(missing_ok=True)


def _sweep(folder: Path, beginning: str) -> None:
    """Remove what killed builds have left: claims that nobody holds."""
    for claim in folder.glob(f"{glob.escape(beginning)}*.tmp/{_CLAIM}"):
        with contextlib.suppress(OSError), claim.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(claim.parent, ignore_errors=True)


def _consume(
    rows: Iterable[_Row] | RandomAccess[_Row], tokenize: Callable[[_Row], Example], writer: _Writer, skip_bad: bool
) -> Counts:
    num_rows, bad, first_bad = 0, 0, None
    for read in _reads(rows):
        num_rows += 1
        try:
            example = tokenize(read())
        except ValueError as error:
            line = _placed(error, rows, num_rows - 1)
            if not skip_bad:
                raise ValueError(line) from error
            bad += 1
            first_bad = first_bad or line
            continue
        writer.add(example)
    writer.end_document()
    return dataclasses.replace(writer.counts, rows=num_rows, skipped_bad=bad, first_bad=first_bad)


def _reads(rows: Iterable[_Row] | RandomAccess[_Row]) -> Iterator[Callable[[], _Row]]:
    """Yield what reads each row, so that a source with random access may fail at one row and go on with the next."""
    if hasattr(rows, "__getitem__") and hasattr(rows, "__len__"):
        for index in range(len(rows)):
            yield functools.partial(rows.__getitem__, index)
    else:
        for row in rows:
            yield functools.partial(lambda row: row, row)


def _placed(error: ValueError, rows: Any, index: int) -> str:
    if isinstance(error, BadRow):
        return str(error)
    return f"{rows.where(index) if hasattr(rows, 'where') else f'row {index}'}: {error}"


def _fate(counts: Counts) -> str:
    fate = [f"{counts.rows} rows"]
    if counts.dropped_empty:
        fate.append(f"{counts.dropped_empty} without a token to learn, or cut off before it")
    if counts.skipped_bad:
        fate.append(f"{counts.skipped_bad} bad, the first of them {counts.first_bad}")
    return ", ".join(fate)


def _publish(unfinished: Path, folder: Path) -> None:
    """Give a finished store its name. Another process may have been faster: then its store stays."""
    try:
        unfinished.rename(folder)
    except OSError:
        if not (folder / META).is_file():
            raise
        if _fingerprint(folder) != _fingerprint(unfinished):
            raise ValueError(f"{folder} holds another data set's tokens") from None


def _fingerprint(folder: Path) -> str:
    return json.loads((folder / META).read_text(encoding="utf-8"))["fingerprint"]


class _Column:
    """A file of the store, with a hash of its content."""

    def __init__(self, path: Path, dtype: str):
        self.file = path.open("wb", buffering=1 << 20)
        self._dtype = dtype
        self.hash = hashlib.blake2b()

    def append(self, values: Any) -> None:
        data = np.ascontiguousarray(values, self._dtype)
        self.file.write(data)
        self.hash.update(data)

    def finish(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())


class _Writer:
    """Appends documents, which may come in pieces. The pieces of a document wait until it has something to learn."""

    def __init__(self, folder: Path, vocab_size: int, max_length: int | None):
        if max_length is not None and max_length < 2:
            raise ValueError(f"documents cut to max_length {max_length} have nothing to predict")
        self._folder, self._dtype = folder, token_dtype(vocab_size)
        self._vocab_size, self._max_length = vocab_size, max_length
        self.counts = Counts()
        self._masked = False
        names = {TOKENS: self._dtype, MASK: "?", OFFSETS: "<i8"}
        self._columns = {name: _Column(folder / name, dtype) for name, dtype in names.items()}
        self._columns[OFFSETS].append([0])
        self._begin()

    def _begin(self) -> None:
        self._length, self._learnt, self._cut = 0, 0, False
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, example: Example) -> None:
        tokens, mask = example.tokens, example.mask
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            raise ValueError(f"token ids {tokens.min()} to {tokens.max()}, the vocabulary has {self._vocab_size}")
        room = len(tokens) if self._max_length is None else self._max_length - self._length
        self._cut |= len(tokens) > room
        tokens, mask = tokens[:room], mask[:room]
        self._learnt += int(np.count_nonzero(mask if self._length else mask[1:]))
        self._length += len(tokens)
        self._waiting.append((tokens, mask))
        if self._learnt:
            self._flush()
        if example.last:
            self.end_document()

    def _flush(self) -> None:
        for tokens, mask in self._waiting:
            self._columns[TOKENS].append(tokens)
            self._columns[MASK].append(mask)
            self._masked |= not mask.all()
        self._waiting.clear()

    def end_document(self) -> None:
        """End the document, if one is open."""
        counts = self.counts
        if self._learnt:
            self.counts = dataclasses.replace(
                counts,
                documents=counts.documents + 1,
                tokens=counts.tokens + self._length,
                learnt_tokens=counts.learnt_tokens + self._learnt,
                truncated=counts.truncated + self._cut,
            )
            self._columns[OFFSETS].append([self.counts.tokens])
        elif self._waiting:
            self.counts = dataclasses.replace(counts, dropped_empty=counts.dropped_empty + 1)
        self._begin()

    def finish(self, counts: Counts) -> None:
        """Bring everything to the disk, meta.json last."""
        for column in self._columns.values():
            column.finish()
        if not self._masked:
            (self._folder / MASK).unlink()
        meta = {
            "format": FORMAT,
            "dtype": self._dtype,
            "masked": self._masked,
            "fingerprint": digest([self._dtype, *(column.hash.hexdigest() for column in self._columns.values())]),
            "counts": dataclasses.asdict(counts),
        }
        with (self._folder / META).open("w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for column in self._columns.values():
                stack.callback(column.file.close)
