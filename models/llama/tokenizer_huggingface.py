"""Tokenizers in the formats of Hugging Face: tokenizer.json, and vocab.json with merges.txt."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.llama import tokenizer_files as files
from models.llama.tokenizer_base import SPACE_MARK, BytesTokenizer, alternation
from models.llama.tokenizer_files import TokenizerSettings

if TYPE_CHECKING:
    import tokenizers

_END_OF_TEXT = "<|endoftext|>"
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
_SENTENCEPIECE_DECODERS = (
    ("Replace", "ByteFallback", "Fuse"),
    ("Replace", "ByteFallback", "Fuse", "Strip"),
)


class HuggingFaceTokenizer(BytesTokenizer):
    """A tokenizer of the `tokenizers` library, as a tokenizer.json or byte-level BPE files describe it.

    Its truncation and padding are switched off, and its post-processor only tells what adds_bos is. Added tokens that
    only the settings list are added. Raises ValueError if their ids do not fit or the decoder is of another kind.
    """

    def __init__(
        self, model: tokenizers.Tokenizer, path: Path, settings: TokenizerSettings, *, bos_eos: int | None = None
    ):
        model.no_truncation()
        model.no_padding()
        _complete(model, path, settings)
        self._model = model
        added = model.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        bos_id = _prepended_id(model)
        super().__init__(
            settings,
            vocab_size=max(model.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
            special_tokens=special,
            find=model.token_to_id,
            bos_id=bos_eos if bos_id is None else bos_id,
            eos_id=bos_eos,
            adds_bos=bos_id is not None,
        )
        self._added_ids = frozenset(added)
        self._special = alternation(special)
        self._normalizes_special = model.normalizer is not None and any(
            token.normalized for token in added.values() if token.special
        )
        self._to_bytes, self._strips_space = _decoding(model, path)

    @functools.cached_property
    def _strict_model(self) -> tokenizers.Tokenizer:
        """A copy for which special tokens are plain text: the switch on the model itself is not safe among threads."""
        model = type(self._model).from_str(self._model.to_str())
        model.encode_special_tokens = True
        return model

    def __getstate__(self) -> dict[str, Any]:
        # The library does not pickle the switch, so the copy has to be made anew.
        return {name: value for name, value in vars(self).items() if name != "_strict_model"}

    def _encode(self, text: str, allow_special: bool) -> list[int]:
        strict = not allow_special and (self._normalizes_special or self._special.search(text))
        model = self._strict_model if strict else self._model
        return model.encode(text, add_special_tokens=False).ids

    def _lookup(self, token_id: int) -> bytes | None:
        token = self._model.id_to_token(token_id)
        return None if token is None else self._to_bytes(token, token_id in self._added_ids)


def load_tokenizer_json(data: bytes, path: Path, settings: TokenizerSettings) -> HuggingFaceTokenizer:
    """Make a tokenizer of a tokenizer.json's content; raises ValueError where it is malformed."""
    import tokenizers

    try:
        model = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: not a readable tokenizer.json: {error}") from error
    return HuggingFaceTokenizer(model, path, settings)


def load_byte_level_bpe(folder: Path, settings: TokenizerSettings) -> HuggingFaceTokenizer:
    """Read GPT-2's vocab.json and merges.txt; `<|endoftext|>`, where there is one, serves as BOS and EOS."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    files.check_byte_level_class(settings, folder)
    vocab, merges = files.parse_byte_level_bpe(folder)
    model = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.add_prefix_space)
    model.decoder = decoders.ByteLevel()
    if _END_OF_TEXT in vocab:
        model.add_special_tokens([_END_OF_TEXT])
    return HuggingFaceTokenizer(model, folder / "vocab.json", settings, bos_eos=vocab.get(_END_OF_TEXT))


def byte_alphabet() -> dict[str, int]:
    """Return printable character -> byte, the alphabet of byte-level BPE.

    Printable Latin-1 characters stand for themselves, the other bytes in order for U+0100 and up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _complete(model: tokenizers.Tokenizer, path: Path, settings: TokenizerSettings) -> None:
    """Add the tokens that only the settings list, and flag as special those that the settings name."""
    from tokenizers import AddedToken

    present = {token.content for token in model.get_added_tokens_decoder().values()}
    named = {settings.bos_token, settings.eos_token, *settings.extra_special_tokens} - {None}
    for token_id, stated in settings.added_tokens.items():
        content = stated["content"]
        flags = {name: bool(stated.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized")}
        special = bool(stated.get("special")) or content in named | {settings.pad_token}
        if content not in present:
            model.add_tokens([AddedToken(content, special=special, **flags)])
        if model.token_to_id(content) != token_id:
            raise ValueError(f"{path}: token {content!r} cannot have the id {token_id} that the files beside it state")
    for content in sorted(named - present - {stated["content"] for stated in settings.added_tokens.values()}):
        if model.token_to_id(content) is not None:
            model.add_special_tokens([AddedToken(content, special=True, normalized=False)])


def _prepended_id(model: tokenizers.Tokenizer) -> int | None:
    """Return the id that the post-processor puts in front of a text."""
    plain = model.encode("a", add_special_tokens=False).ids
    processed = model.encode("a", add_special_tokens=True).ids
    return processed[0] if processed[:1] != plain[:1] else None


def _decoding(model: tokenizers.Tokenizer, path: Path) -> tuple[Callable[[str, bool], bytes], bool]:
    """Return (token, is it an added token) -> bytes, and whether a space is taken away at the start of a text.

    Without a decoder the library joins tokens with spaces. Raises ValueError for decoders that do not fit this rule.
    """
    steps = _steps(json.loads(model.decoder.__getstate__())) if model.decoder is not None else []
    kinds = tuple(step["type"] for step in steps)
    if not kinds:
        return _spaced, True
    if kinds == ("ByteLevel",):
        return functools.partial(_byte_level, alphabet=byte_alphabet()), False
    if kinds == ("Fuse",):
        return _verbatim, False
    if kinds == ("Metaspace",):
        mark, strip = steps[0]["replacement"], steps[0].get("prepend_scheme") != "never"
        return functools.partial(_marked, mark=mark), strip
    if kinds in _SENTENCEPIECE_DECODERS and _is_sentencepiece(steps):
        return _byte_fallback, kinds[-1] == "Strip"
    raise ValueError(f"{path}: no rule for decoding with {' + '.join(kinds)}")


def _steps(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _steps(part)]
    return [decoder]


def _is_sentencepiece(steps: list[Mapping[str, Any]]) -> bool:
    replace, strip = steps[0], steps[-1]
    space = replace["pattern"] == {"String": SPACE_MARK} and replace["content"] == " "
    one = strip["type"] != "Strip" or (strip["content"], strip["start"], strip["stop"]) == (" ", 1, 0)
    return space and one


def _byte_level(token: str, added: bool, alphabet: Mapping[str, int]) -> bytes:
    if added or not all(character in alphabet for character in token):
        return token.encode()
    return bytes(alphabet[character] for character in token)


def _verbatim(token: str, added: bool) -> bytes:
    return token.encode()


def _spaced(token: str, added: bool) -> bytes:
    return b" " + token.encode()


def _marked(token: str, added: bool, mark: str) -> bytes:
    return token.replace(mark, " ").encode()


def _byte_fallback(token: str, added: bool) -> bytes:
    if _BYTE_TOKEN.fullmatch(token):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE_MARK, " ").encode()
