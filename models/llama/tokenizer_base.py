"""What all tokenizers share: ids to text by the bytes of each token, and the conventions of a checkpoint.

Every format decodes by one rule: the bytes of the tokens are joined and read as UTF-8, with U+FFFD for whatever is
malformed. Whole and incremental decoding share that code and so agree in every case.
"""

from __future__ import annotations

import abc
import codecs
import contextlib
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping

from models.llama.tokenizer_files import TokenizerSettings

SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


class IncrementalDecoder:
    """Decode ids as they arrive, holding back the bytes of a character that is not complete yet."""

    def __init__(self, token_bytes: Callable[[int], bytes], *, skipped: Collection[int], strip_space: bool):
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._strip_space = strip_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: int | Iterable[int]) -> str:
        """Return the text that one id or some ids complete."""
        with contextlib.suppress(TypeError):  # several ids
            ids = (operator.index(ids),)
        data = b"".join(self._token_bytes(i) for i in map(operator.index, ids) if i not in self._skipped)
        if data and self._strip_space:
            data = data.removeprefix(b" ")
            self._strip_space = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Return the replacement characters for what was held back, at the end of the ids."""
        return self._utf8.decode(b"", final=True)


class BytesTokenizer(abc.ABC):
    """What all formats share; a format says how text is encoded and which bytes a token has.

    The ids handed over are the format's own; names in the settings come before them, ids in the settings after them.
    """

    _strips_space = False

    def __init__(
        self,
        settings: TokenizerSettings,
        *,
        vocab_size: int,
        special_tokens: Mapping[str, int],
        find: Callable[[str], int | None],
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        adds_bos: bool = False,
        stop_ids: Iterable[int] = (),
    ):
        def choose(name: str | None, own: int | None, stated: int | None) -> int | None:
            found = find(name) if name is not None else None
            return next((i for i in (found, own, stated) if i is not None), None)

        stated_eos = settings.eos_token_ids
        self.vocab_size = vocab_size
        self.special_tokens: Mapping[str, int] = dict(special_tokens)
        self.bos_id = choose(settings.bos_token, bos_id, settings.bos_token_id)
        self.eos_id = choose(settings.eos_token, eos_id, stated_eos[0] if stated_eos else None)
        self.pad_id = choose(settings.pad_token, pad_id, settings.pad_token_id)
        said = settings.add_bos_token
        self.adds_bos = self.bos_id is not None and (adds_bos if said is None else said)
        self.stop_ids = frozenset(i for i in (self.eos_id, *stated_eos, *stop_ids) if i is not None)
        self.chat_template = settings.chat_template
        self._special_ids = frozenset(special_tokens.values())
        self._bytes: dict[int, bytes] = {}

    @abc.abstractmethod
    def _encode(self, text: str, allow_special: bool) -> list[int]:
        """Encode a well-formed, non-empty text."""

    @abc.abstractmethod
    def _lookup(self, token_id: int) -> bytes | None:
        """Return the bytes of a token, or None for an id below vocab_size that has no token."""

    def encode(self, text: str, *, add_bos: bool = False, allow_special: bool = False) -> list[int]:
        if add_bos and self.bos_id is None:
            raise ValueError("add_bos asked of a tokenizer that has no BOS token")
        ids = self._encode(_well_formed(text), allow_special) if text else []
        return [self.bos_id, *ids] if add_bos else ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False, continuation: bool = False) -> str:
        decoder = self.decoder(skip_special=skip_special, continuation=continuation)
        return decoder.push(ids) + decoder.flush()

    def token_bytes(self, token_id: int) -> bytes:
        data = self._bytes.get(token_id)
        if data is None:
            if token_id < 0:
                raise ValueError(f"token id {token_id} is negative")
            data = self._lookup(token_id) if token_id < self.vocab_size else None
            data = self._bytes[token_id] = _REPLACEMENT if data is None else data
        return data

    def decoder(self, *, skip_special: bool = False, continuation: bool = False) -> IncrementalDecoder:
        skipped = self._special_ids if skip_special else frozenset()
        return IncrementalDecoder(
            self.token_bytes, skipped=skipped, strip_space=self._strips_space and not continuation
        )


def alternation(names: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern whose only group matches any of the names, the longest first, or nothing if there are none."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


def _well_formed(text: str) -> str:
    """Return a text that UTF-8 can hold: surrogate pairs joined, lone surrogates replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
