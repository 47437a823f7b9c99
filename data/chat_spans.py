"""Character ranges of an encoded text to the tokens that stand for them."""

from __future__ import annotations

import itertools
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from data.chat_guard import ChatTokenizer, Guard, Piece

Span = tuple[int, int]  # characters [start, stop)


class SpanTokenizer(ChatTokenizer, Protocol):
    """The part of a tokenizer that masks need."""

    stop_ids: Collection[int]

    def token_bytes(self, token_id: int) -> bytes: ...


def mask_spans(
    text: str, spans: Sequence[Span], guard: Guard, tokenizer: SpanTokenizer, *, whole: bool
) -> tuple[list[int], list[bool]]:
    """Encode a guarded text and tell which tokens stand for the characters in the spans.

    A token across the edge of a span belongs to it. Of a last character that is several tokens all belong to it if
    whole, else the first, which is how transformers reads assistant masks. Raises ValueError where a tokenizer changes
    a text in a way that leaves it open which tokens are meant.
    """
    pieces = guard.pieces(text, tokenizer)
    if sum(len(piece.guarded) for piece in pieces) < len(text):  # without its seams
        spans = [tuple(place - guard.seams(text[:place]) for place in span) for span in spans]
    ids: list[int] = []
    mask: list[bool] = []
    position = 0
    for piece in pieces:
        end = position + len(piece.guarded)
        inside = [
            _Part(
                len(guard.reveal(piece.guarded[: max(start - position, 0)])),
                len(guard.reveal(piece.guarded[: stop - position])),
                whole or stop > end,
            )
            for start, stop in spans
            if start < end and stop > position
        ]
        ids += piece.ids
        mask += _mask_piece(piece, inside, tokenizer)
        position = end
    return ids, mask


class _Part(NamedTuple):
    """Characters [start, stop) of a piece's text that a span covers; whole as in `mask_spans`."""

    start: int
    stop: int
    whole: bool


def _mask_piece(piece: Piece, parts: Sequence[_Part], tokenizer: SpanTokenizer) -> list[bool]:
    mask = [False] * len(piece.ids)
    if not parts or not piece.ids:
        return mask
    found = _read_tokens(piece, tokenizer)
    for start, stop, whole in parts:
        if found is None:
            first, end = (_count_tokens(piece, place, tokenizer) for place in (start, stop))
        else:
            text, ends = found
            first, end = _token_range(text, ends, *(_place(piece.text, text, place) for place in (start, stop)), whole)
        mask[first:end] = [True] * max(min(end, len(mask)) - first, 0)
    return mask


def _token_range(text: str, ends: Sequence[int], start: int, stop: int, whole: bool) -> tuple[int, int]:
    """Return the tokens [first, end) for characters [start, stop); ends are the tokens' ends in bytes of the text."""
    if start == stop and (whole or not stop):
        return 0, 0
    begin = len(_utf8(text[:start]))
    first = bisect_right(ends, begin)
    while first and ends[first - 1] == begin == (ends[first - 2] if first > 1 else 0):
        first -= 1  # a token without text: the space that a tokenizer puts in front
    last = bisect_left(ends, len(_utf8(text[:stop]))) if whole else bisect_right(ends, len(_utf8(text[: stop - 1])))
    return first, last + 1


def _read_tokens(piece: Piece, tokenizer: SpanTokenizer) -> tuple[str, list[int]] | None:
    """Return the text that the tokens spell, as it was encoded or in a Unicode normal form, and where in its bytes
    each token ends; None where it is neither.
    """
    tokens = list(map(tokenizer.token_bytes, piece.ids))
    special = frozenset(tokenizer.special_tokens.values())
    seen: set[str] = set()
    for form in (None, "NFC", "NFKC", "NFD", "NFKD"):
        text = piece.text if form is None else unicodedata.normalize(form, piece.text)
        if text not in seen:
            seen.add(text)
            ends = _align(_utf8(text), tokens, [token_id in special for token_id in piece.ids])
            if ends is not None:
                return text, ends
    return None


def _align(data: bytes, tokens: Sequence[bytes], special: Sequence[bool]) -> list[int] | None:
    """Return where each token ends in the data, with a space more in front or with spaces beside special tokens gone;
    None where the tokens spell something else.
    """
    if b"".join(tokens) == data:
        return list(itertools.accumulate(map(len, tokens)))
    ends: list[int] = []
    position = 0
    for index, token in enumerate(tokens):
        if not data.startswith(token, position):
            behind = position + len(data[position:]) - len(data[position:].lstrip())
            if token[:1] == b" " and data.startswith(token[1:], position):
                token = token[1:]
            elif behind > position and data.startswith(token, behind):
                if index and special[index - 1]:
                    ends[-1] = behind
                elif not special[index]:
                    return None
                position = behind
            else:
                return None
        position += len(token)
        ends.append(position)
    if data[position:].strip() or (position < len(data) and not (special and special[-1])):
        return None
    return ends


def _place(original: str, text: str, place: int) -> int:
    """Return where in a normalized text a place of the original is."""
    if text is original or text == original:
        return place
    for form in ("NFC", "NFKC", "NFD", "NFKD"):
        before, behind = (unicodedata.normalize(form, part) for part in (original[:place], original[place:]))
        if before + behind == text:
            return len(before)
    raise _unclear(original, place)


def _count_tokens(piece: Piece, place: int, tokenizer: SpanTokenizer) -> int:
    """Return how many tokens stand before a place, of a text that its tokens do not spell out."""
    before = tokenizer.encode(piece.text[:place], allow_special=piece.guarded == piece.text)
    if piece.ids[: len(before)] != before:
        raise _unclear(piece.text, place)
    return len(before)


def _unclear(text: str, place: int) -> ValueError:
    around = text[max(place - 20, 0) : place], text[place : place + 20]
    return ValueError(f"the tokenizer changes the text: no token begins between {around[0]!r} and {around[1]!r}")


def _utf8(text: str) -> bytes:
    return text.encode(errors="replace")  # of lone surrogates, which tokens do not spell as they are either
