"""What readers have in common: rows by number, and bytes of files that are not held in memory."""

from __future__ import annotations

import gzip
import io
import operator
import os
import shutil
import tempfile
import weakref
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.records import BadRow

_CHUNK = 1 << 20


class Rows(ABC):
    """Rows of a data set by their number, from any thread; negative numbers count from the end.

    Getting a row that cannot be read raises BadRow.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, index: int) -> str:
        """Where a row is: "path:line", of its first line, or "name:number" where rows have no lines; both from 1."""

    @abstractmethod
    def _row(self, index: int) -> Mapping[str, Any]:
        """Return the row of an index in range(len(self))."""

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._row(self._checked(index))

    def _checked(self, index: int) -> int:
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)} rows")
        return number % len(self)


class Bytes(Protocol):
    """The bytes of a file, decompressed, from any thread. name is the file's path, for messages."""

    name: str

    def read(self, start: int, stop: int) -> bytes: ...

    def open(self) -> AbstractContextManager[io.BufferedIOBase]:
        """Open a stream from the beginning."""


class PlainFile:
    """A file that is opened for each read, so that thousands of them take no descriptors.

    Reading raises OSError where the file has changed: that is no bad row, to be skipped.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._state = _state(path.stat())

    def open(self) -> io.BufferedReader:
        return self._path.open("rb")

    def read(self, start: int, stop: int) -> bytes:
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            if _state(os.fstat(descriptor)) != self._state:
                raise OSError(f"{self.name} has changed since it was opened")
            return _pread(descriptor, start, stop)
        finally:
            os.close(descriptor)


class Scratch:
    """One unlinked temporary file, in the system's temporary folder, that holds what was compressed."""

    def __init__(self) -> None:
        self._file: Any = None

    def fileno(self) -> int:
        return self._file.fileno()

    def unpack(self, path: Path) -> UnpackedFile:
        """Decompress a gzip file. Raises ValueError for one that is cut off or damaged."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
            weakref.finalize(self, self._file.close)
        start = self._file.seek(0, io.SEEK_END)
        try:
            with gzip.open(path, "rb") as packed:
                shutil.copyfileobj(packed, self._file, _CHUNK)
        except EOFError as error:
            raise ValueError(f"{path} is cut off: its gzip stream has no end") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is no valid gzip file: {error}") from error
        return UnpackedFile(str(path), self, start, self._file.tell())


class UnpackedFile:
    """What one compressed file holds."""

    def __init__(self, name: str, scratch: Scratch, start: int, stop: int) -> None:
        self.name = name
        self._scratch = scratch
        self._start, self._stop = start, stop

    def open(self) -> io.BufferedReader:
        return io.BufferedReader(_Region(self), _CHUNK)

    def read(self, start: int, stop: int) -> bytes:
        begin, end = self._start + start, min(self._start + stop, self._stop)
        return _pread(self._scratch.fileno(), begin, end)


class _Region(io.RawIOBase):
    """A stream of an unpacked file."""

    def __init__(self, file: UnpackedFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(self._position, self._position + len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class Spans:
    """Where rows are in a file: the first byte, the byte behind the last, and the line, in 24 bytes a row."""

    def __init__(self) -> None:
        self._numbers = array("q")

    def append(self, start: int, stop: int, line: int) -> None:
        self._numbers.extend((start, stop, line))

    def frozen(self) -> np.ndarray:
        """Return an int64 array of [rows, 3]."""
        return np.frombuffer(self._numbers, np.int64).reshape(-1, 3) if self._numbers else np.zeros((0, 3), np.int64)


class FileRows(Rows):
    """Rows that are spans of bytes of one file."""

    def __init__(self, file: Bytes, spans: np.ndarray) -> None:
        self._file = file
        self._spans = spans

    def __len__(self) -> int:
        return len(self._spans)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._file.name!r}, {len(self)} rows)"

    def where(self, index: int) -> str:
        return f"{self._file.name}:{self._spans[self._checked(index), 2]}"

    def _text(self, index: int) -> str:
        start, stop, line = map(int, self._spans[index])
        return decode(self._file.read(start, stop), self._file.name, line)


def decode(data: bytes, name: str, line: int) -> str:
    """Decode UTF-8 that begins on a line. Raises BadRow with the line of the first byte that is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise BadRow(f"{name}:{line}: not UTF-8 at byte 0x{data[error.start]:02x} ({error.reason})") from None


def _pread(descriptor: int, start: int, stop: int) -> bytes:
    parts = []
    while start < stop and (part := os.pread(descriptor, stop - start, start)):
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _state(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns
