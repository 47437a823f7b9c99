"""Rows of plain text: pieces of a file, its lines, or its paragraphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.readers_base import Bytes, FileRows, Spans

UNITS = ("file", "line", "paragraph")
_BOM = b"\xef\xbb\xbf"
_PIECE = 1 << 20


class TextRows(FileRows):
    """Rows `{"text"}` without the line end, or white lines, behind them."""

    def _row(self, index: int) -> Mapping[str, Any]:
        return {"text": self._text(index).rstrip("\r\n")}


class TextPieces(FileRows):
    """Rows `{"text", "first", "last"}` of one document, which are its text when joined."""

    def _row(self, index: int) -> Mapping[str, Any]:
        return {"text": self._text(index), "first": index == 0, "last": index == len(self) - 1}


def open_text(file: Bytes, unit: str) -> FileRows:
    """Index a text file.

    unit "file" is one document, in pieces of about a megabyte that end with a line, where a line is not longer; it is
    read as it is, line ends included, but for a byte order mark. "line" and "paragraph" are documents of one line and
    of the lines between blank ones, without the line ends behind them; blank lines are none.
    """
    if unit not in UNITS:
        raise ValueError(f"unknown unit {unit!r}, expected one of {UNITS}")
    if unit == "file":
        return _open_pieces(file)
    spans, start, begun = Spans(), 0, None
    with file.open() as stream:
        for number, line in enumerate(stream, start=1):
            text_start = start + (len(_BOM) if start == 0 and line.startswith(_BOM) else 0)
            blank = text_start == start + len(line) or line[text_start - start :].isspace()
            start += len(line)
            if unit == "line" and not blank:
                spans.append(text_start, start, number)
            elif not blank:
                begun = begun or (text_start, number)
                end = start
            elif begun:
                spans.append(begun[0], end, begun[1])
                begun = None
    if begun:
        spans.append(begun[0], end, begun[1])
    return TextRows(file, spans.frozen())


def _open_pieces(file: Bytes) -> TextPieces:
    """Index the pieces of a document; one that is not UTF-8 is a single row, the bytes that are not."""
    spans, line = Spans(), 1
    start = len(_BOM) if file.read(0, len(_BOM)) == _BOM else 0
    while window := file.read(start, start + _PIECE):
        piece = window[: _cut(window)] if len(window) == _PIECE else window
        try:
            piece.decode("utf-8")
        except UnicodeDecodeError as error:
            spans = Spans()
            spans.append(start + error.start, start + error.end, line + piece.count(b"\n", 0, error.start))
            break
        spans.append(start, start + len(piece), line)
        line += piece.count(b"\n")
        start += len(piece)
    return TextPieces(file, spans.frozen())


def _cut(window: bytes) -> int:
    """Where a piece may end: behind a line, else before a space, else before a character."""
    end = window.rfind(b"\n") + 1 or max(window.rfind(b" "), 0)
    if not end:
        end = len(window) - 1
        while end > len(window) - 4 and window[end] & 0xC0 == 0x80:
            end -= 1
    return end
