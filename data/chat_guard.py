"""Keep the names of special tokens that users write out of the hands of chat templates."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class ChatTokenizer(Protocol):
    """The part of a tokenizer that chats need."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    adds_bos: bool
    special_tokens: Mapping[str, int]
    chat_template: str | None

    def encode(self, text: str, *, add_bos: bool = False, allow_special: bool = False) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Piece:
    """A stretch of a guarded text, the text that was encoded for it, and its ids."""

    guarded: str
    text: str
    ids: list[int]


class Guard:
    """Hides the names of special tokens from a template, and encodes what it makes of them as plain text.

    A name is replaced by one character of its own. Behind a string that ends with the beginning of a name stands a
    seam, so that strings which a template puts side by side do not join to a name either.
    """

    def __init__(self, names: tuple[str, ...], strings: Any):
        self._pattern, self._beginnings, self._longest = _name_patterns(names)
        self._free = unused_characters(strings)
        self._seam = next(self._free)
        self._hidden: dict[str, str] = {}

    def hide(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        if not isinstance(value, str):
            return value
        text = self._pattern.sub(lambda match: self._character(match[0]), value)
        open_end = any(text[-size:] in self._beginnings for size in range(1, min(self._longest, len(text) + 1)))
        return text + self._seam if open_end else text

    def free_character(self) -> str:
        """A character that neither the strings nor the guard have used."""
        return next(self._free)

    def pieces(self, text: str, tokenizer: ChatTokenizer) -> list[Piece]:
        """Encode a rendered text in stretches; `guarded` joined is the text, or the text without its seams."""
        joined = text.replace(self._seam, "")
        if len(self._pattern.findall(joined)) == len(self._pattern.findall(text)):
            text = joined
        own = re.compile("[" + "".join([self._seam, *self._hidden.values()]) + "]")
        pieces: list[Piece] = []
        clean, before = "", ""
        for position, part in enumerate(self._pattern.split(text)):
            if position % 2 or not own.search(part):
                clean += part
                before = part if position % 2 else before
            else:
                pieces.append(Piece(clean, clean, tokenizer.encode(clean, allow_special=True)))
                plain = self.reveal(part)
                pieces.append(Piece(part, plain, _encode_plain(plain, before, tokenizer)))
                clean = ""
        return [*pieces, Piece(clean, clean, tokenizer.encode(clean, allow_special=True))]

    def reveal(self, text: str) -> str:
        """Put the names back into a text."""
        names = {ord(character): name for name, character in self._hidden.items()}
        return text.translate(names | {ord(self._seam): ""})

    def seams(self, text: str) -> int:
        return text.count(self._seam)

    def _character(self, name: str) -> str:
        if name not in self._hidden:
            self._hidden[name] = next(self._free)
        return self._hidden[name]


def strings_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from itertools.chain(strings_of(key), strings_of(item))
    elif isinstance(value, (list, tuple)):
        yield from itertools.chain.from_iterable(map(strings_of, value))


def unused_characters(value: Any) -> Iterator[str]:
    """Yield private-use characters that occur in no string of the value."""
    used = set().union(*strings_of(value))
    return (character for character in map(chr, _PRIVATE_USE) if character not in used)


@functools.lru_cache(maxsize=16)
def _name_patterns(names: tuple[str, ...]) -> tuple[re.Pattern[str], frozenset[str], int]:
    """Return a pattern of the names, longest first, their proper beginnings, and the length of the longest."""
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"
    beginnings = frozenset(name[:size] for name in names for size in range(1, len(name)))
    return re.compile(f"({pattern})"), beginnings, max(map(len, names), default=0)


def _encode_plain(text: str, before: str, tokenizer: ChatTokenizer) -> list[int]:
    """Encode text without special tokens as it would be encoded behind the special token `before`, if there is one.

    Some SentencePiece tokenizers put a space in front of a whole text but not behind a special token.
    """
    if not before or tokenizer.encode(before + "a", allow_special=True)[1:] == tokenizer.encode("a"):
        return tokenizer.encode(text)
    newline, ids = tokenizer.encode("\n"), tokenizer.encode("\n" + text)
    return ids[len(newline) :] if ids[: len(newline)] == newline else tokenizer.encode(text)
