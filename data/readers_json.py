"""Rows of JSON: one a line, or the elements of one list."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from data.readers_base import Bytes, FileRows, Spans
from data.records import BadRow

_CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NOT_SPACE = re.compile(rb"[^ \t\r\n]")
# Inside a list, which is level 1, commas count; deeper they do not.
_LIST_MARK = re.compile(rb'["\[\]{},]')
_DEEP_MARK = re.compile(rb'["\[\]{}]')
# As much of a string as there is, up to its end, the chunk's end, or a backslash that ends the chunk.
_STRING_REST = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)


class JsonRows(FileRows):
    """Rows of which each is the text of a JSON object."""

    def _row(self, index: int) -> Mapping[str, Any]:
        text, line = self._text(index).rstrip(), int(self._spans[index, 2])
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            place = f"{self._file.name}:{line + error.lineno - 1}"
            raise BadRow(f"{place}: invalid JSON: {error.msg} (column {error.colno})") from None
        except (ValueError, RecursionError) as error:
            raise BadRow(f"{self.where(index)}: invalid JSON: {error}") from None
        if not isinstance(row, dict):
            raise BadRow(f"{self.where(index)}: a row must be a JSON object, got {type(row).__name__}")
        if _SURROGATE.search(text):
            _check_surrogates(row, self.where(index))
        return row


def open_json_lines(file: Bytes) -> JsonRows:
    """Index a file with a JSON object on each line that is not blank."""
    spans, start = Spans(), 0
    with file.open() as stream:
        for number, line in enumerate(stream, start=1):
            skipped = len(_BOM) if start == 0 and line.startswith(_BOM) else 0
            if not (line[skipped:] if skipped else line).isspace() and len(line) > skipped:
                spans.append(start + skipped, start + len(line), number)
            start += len(line)
    return JsonRows(file, spans.frozen())


def open_json(file: Bytes) -> JsonRows:
    """Index a file that is one JSON list, or JSON lines. Raises ValueError for one that is neither."""
    if _first_byte(file) == b"[":
        return JsonRows(file, _ListScan(file.name).spans(_chunks(file)))
    rows = open_json_lines(file)
    faults = [fault for index in range(min(2, len(rows))) if (fault := _fault(rows, index))]
    if faults and len(faults) == min(2, len(rows)):
        raise ValueError(f"{file.name} is neither a JSON list nor JSON lines ({faults[0]})")
    return rows


def _fault(rows: JsonRows, index: int) -> str | None:
    try:
        rows[index]
    except BadRow as error:
        return str(error)
    return None


class _ListScan:
    """Finds where the elements of a list begin and end; what is in them is looked at only for brackets and strings."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._spans = Spans()
        self._depth = 0
        self._in_string = False
        self._start: int | None = None
        self._after_comma = False
        self._ended = False
        self._line = self._start_line = 1
        self._base = 0

    def spans(self, chunks: Iterator[bytes]) -> Any:
        """Return the spans of the elements. Raises ValueError for a list that is not one or has no end."""
        carried = b""
        for chunk in chunks:
            data = carried + chunk
            used = self._scan(data)
            self._base += used
            carried = data[used:]
        if not self._ended:
            inside = "" if self._start is None else f", inside the element that begins on line {self._start_line}"
            raise ValueError(f"{self._name} is cut off: its JSON list has no end{inside}")
        return self._spans.frozen()

    def _scan(self, data: bytes) -> int:
        """Take in bytes, all but perhaps a last backslash; return how many."""
        position = counted = 0
        while position < len(data):
            if self._in_string:
                position = _STRING_REST.match(data, position).end()
                if position == len(data) or data[position] == ord("\\"):
                    break
                self._in_string, position = False, position + 1
                continue
            expecting = self._depth == 0 or (self._depth == 1 and self._start is None)
            pattern = _NOT_SPACE if expecting else _LIST_MARK if self._depth == 1 else _DEEP_MARK
            found = pattern.search(data, position)
            if found is None:
                position = len(data)
                break
            self._line += data.count(b"\n", counted, found.start())
            counted, position = found.start(), found.end()
            if expecting and not self._expected(found[0], self._base + found.start()):
                continue
            self._mark(found[0], self._base + found.start())
        self._line += data.count(b"\n", counted, position)
        return position

    def _expected(self, byte: bytes, place: int) -> bool:
        """Take a byte where the list, an element or the list's end should begin; return if it is a mark as well."""
        if self._ended or (self._depth == 0 and byte != b"["):
            raise ValueError(f"{self._name}:{self._line}: {_shown(byte)} behind the end of the JSON list")
        if self._depth == 0:
            self._depth = 1
            return False
        if byte == b"," or (byte == b"]" and self._after_comma):
            raise ValueError(f"{self._name}:{self._line}: {_shown(byte)} where an element of the list should be")
        if byte == b"]":
            self._depth, self._ended = 0, True
            return False
        self._start, self._start_line = place, self._line
        return byte in b'"[{}'

    def _mark(self, byte: bytes, place: int) -> None:
        """Take a quote, bracket, brace or, between elements, comma."""
        if byte == b'"':
            self._in_string = True
        elif byte in b"[{":
            self._depth += 1
        elif byte in b"]}" and self._depth > 1:
            self._depth -= 1
        elif byte == b"}":
            raise ValueError(f"{self._name}:{self._line}: '}}' that closes nothing")
        else:
            self._spans.append(self._start, place, self._start_line)
            self._start, self._after_comma = None, byte == b","
            if byte == b"]":
                self._depth, self._ended = 0, True


def _chunks(file: Bytes) -> Iterator[bytes]:
    """Yield a file's bytes; in place of a byte order mark, spaces."""
    with file.open() as stream:
        chunk = stream.read(len(_BOM))
        yield b" " * len(_BOM) if chunk == _BOM else chunk
        while chunk := stream.read(_CHUNK):
            yield chunk


def _first_byte(file: Bytes) -> bytes:
    found = (_NOT_SPACE.search(chunk) for chunk in _chunks(file))
    return next((match[0] for match in found if match), b"")


def _check_surrogates(row: Any, where: str) -> None:
    """Raise BadRow for half a character, which JSON can write and UTF-8 cannot."""
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{where}: half of a surrogate pair, U+{ord(error.object[error.start]):04X}") from None


def _shown(byte: bytes) -> str:
    return repr(byte.decode("latin-1"))
