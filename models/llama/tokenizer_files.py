"""Readers for tokenizer files and for the settings that checkpoints keep beside them."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LFS_POINTER = b"version https://git-lfs"
_TOKEN_ID = re.compile("[0-9]{1,9}")
_KINDS: dict[str, tuple[type, ...]] = {
    "bos_token": (str, dict),
    "eos_token": (str, dict),
    "pad_token": (str, dict),
    "tokenizer_class": (str,),
    "additional_special_tokens": (list,),
    "extra_special_tokens": (list, dict),
    "added_tokens_decoder": (dict,),
    "chat_template": (str, list, dict),
}
_GPT2_CLASSES = ("GPT2", "PreTrainedTokenizer", "TokenizersBackend")


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """What the JSON files beside a tokenizer say about its use; None and empty stand for "not said"."""

    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    add_bos_token: bool | None = None
    add_prefix_space: bool = False
    tokenizer_class: str | None = None
    extra_special_tokens: tuple[str, ...] = ()
    added_tokens: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    chat_template: str | None = None
    exact_vocab_size: int | None = None


def read_settings(folder: Path) -> TokenizerSettings:
    """Collect the settings of a checkpoint folder.

    Reads tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.jinja, config.json,
    generation_config.json and Meta's params.json, each of which may be missing. Raises ValueError for a malformed one.
    """
    config = _read_tokens(folder / "special_tokens_map.json") | _read_tokens(folder / "tokenizer_config.json")
    generation = _read_object(folder / "generation_config.json")
    model = _read_object(folder / "config.json")
    ids = [*_ids(generation.get("eos_token_id")), *_ids(model.get("eos_token_id"))]
    add_bos = config.get("add_bos_token")
    vocab_size = _read_object(folder / "params.json").get("vocab_size")
    return TokenizerSettings(
        bos_token=_content(config.get("bos_token")),
        eos_token=_content(config.get("eos_token")),
        pad_token=_content(config.get("pad_token")),
        bos_token_id=None if _denied(config, "bos_token") else _first_id(generation, model, key="bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(ids)),
        pad_token_id=None if _denied(config, "pad_token") else _first_id(generation, model, key="pad_token_id"),
        add_bos_token=add_bos if isinstance(add_bos, bool) else None,
        add_prefix_space=config.get("add_prefix_space") is True,
        tokenizer_class=config.get("tokenizer_class"),
        extra_special_tokens=tuple(content for content in map(_content, _extra_special_tokens(config)) if content),
        added_tokens=_added_tokens(folder, config),
        chat_template=_chat_template(folder, config),
        exact_vocab_size=vocab_size if type(vocab_size) is int and vocab_size > 0 else None,
    )


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes.

    Raises FileNotFoundError where there is none, ValueError for an empty one and for a Git LFS pointer in its place.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, and the tokenizer needs it")
    data = path.read_bytes()
    if not data.strip():
        raise ValueError(f"{path}: the file is empty, expected a tokenizer")
    if data.startswith(_LFS_POINTER):
        raise ValueError(f"{path}: a Git LFS pointer, not the tokenizer itself; fetch it with `git lfs pull`")
    return data


def looks_like_tiktoken(data: bytes) -> bool:
    """Tell whether a file begins with a line of base64 bytes, a space and a rank."""
    fields = data[:4096].split(b"\n", 1)[0].split()
    return len(fields) == 2 and fields[1].isdigit() and _base64(fields[0]) is not None


def parse_tiktoken_ranks(data: bytes, path: Path) -> dict[bytes, int]:
    """Return token bytes -> rank.

    Raises ValueError unless the ranks count up from 0 without a gap and all 256 single bytes are there.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        fields = line.split()
        token = _base64(fields[0]) if len(fields) == 2 else None
        if token is None or not fields[1].isdigit():
            raise ValueError(f"{path}: line {number} is not base64 bytes, a space and a rank (truncated file?)")
        if int(fields[1]) != len(ranks) or token in ranks:
            raise ValueError(
                f"{path}: line {number} has rank {int(fields[1])}, expected new bytes of rank {len(ranks)}"
            )
        ranks[token] = len(ranks)
    missing = sum(bytes([value]) not in ranks for value in range(256))
    if missing:
        raise ValueError(f"{path}: {missing} of the 256 single bytes have no token (truncated file?)")
    return ranks


def parse_byte_level_bpe(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary of vocab.json and the merges of merges.txt, best merge first.

    Only a first line that begins with "#version" is a comment: "#" also begins ordinary merges.
    """
    read_bytes(folder / "vocab.json")
    vocab = _read_object(folder / "vocab.json")
    if not vocab or not all(type(value) is int and 0 <= value < 2**32 for value in vocab.values()):
        raise ValueError(f"{folder / 'vocab.json'}: expected a JSON object of token -> id")
    path = folder / "merges.txt"
    try:
        lines = read_bytes(path).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2 or not all(token in vocab for token in (*pair, "".join(pair))):
            raise ValueError(f"{path}: line {number} does not merge two tokens of vocab.json into a third")
        merges.append((pair[0], pair[1]))
    return vocab, merges


def check_byte_level_class(settings: TokenizerSettings, folder: Path) -> None:
    """Raise ValueError where vocab.json and merges.txt belong to a tokenizer that does not split text as GPT-2 does."""
    name = settings.tokenizer_class
    if name is not None and not name.startswith(_GPT2_CLASSES):
        raise ValueError(f"{folder}: vocab.json + merges.txt of a {name} need its tokenizer.json, which is not there")


def check_sentencepiece(data: bytes, path: Path) -> None:
    """Raise ValueError unless the bytes are a whole SentencePiece model.

    A model cut between two pieces still parses, as one with fewer pieces and default settings; so the trainer and
    normalizer messages (fields 2 and 3 of ModelProto), which follow the pieces, are asked for.
    """
    try:
        fields = set(_protobuf_fields(data))
    except (IndexError, ValueError) as error:
        raise ValueError(
            f"{path}: neither a whole SentencePiece model nor tiktoken lines of base64 and rank"
        ) from error
    if not {1, 2, 3} <= fields:
        raise ValueError(f"{path}: a SentencePiece model without its pieces or settings (truncated file?)")


def _protobuf_fields(data: bytes) -> Iterator[int]:
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire_type = key & 7
        if wire_type == 0:
            _, position = _varint(data, position)
        elif wire_type == 2:
            size, position = _varint(data, position)
            position += size
        elif wire_type in (1, 5):
            position += 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type}")
        if position > len(data):
            raise ValueError("the last field is cut")
        yield key >> 3


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _base64(text: bytes) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return None


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value


def _read_tokens(path: Path) -> dict[str, Any]:
    """Read tokenizer_config.json or special_tokens_map.json; raises ValueError for values of the wrong kind."""
    config = _read_object(path)
    for key, kinds in _KINDS.items():
        if not isinstance(config.get(key), (*kinds, type(None))):
            names = " or ".join({str: "a string", list: "a list", dict: "an object"}[kind] for kind in kinds)
            raise ValueError(f"{path}: {key} must be {names}, not {str(config[key])[:80]}")
    tokens = [config.get(key) for key in ("bos_token", "eos_token", "pad_token")]
    for token in (*(token for token in tokens if token is not None), *_extra_special_tokens(config)):
        if _content(token) is None:
            raise ValueError(f"{path}: {str(token)[:80]} is no token, which is a string or an object with `content`")
    for token_id, token in (config.get("added_tokens_decoder") or {}).items():
        if not _TOKEN_ID.fullmatch(token_id) or not isinstance(token, dict) or not _content(token):
            raise ValueError(
                f"{path}: added_tokens_decoder entry {token_id[:80]!r} is not an id with a token's content"
            )
    templates = config.get("chat_template")
    if isinstance(templates, list) and not all(isinstance(entry, dict) for entry in templates):
        raise ValueError(f"{path}: chat_template is a list of other things than objects with `name` and `template`")
    return config


def _content(token: Any) -> str | None:
    """Return the text of a token that is written as a string or as an AddedToken object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _denied(config: Mapping[str, Any], name: str) -> bool:
    """Tell whether a config says that there is no such token, which is more than saying nothing."""
    return name in config and config[name] is None


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and i >= 0]


def _first_id(*configs: Mapping[str, Any], key: str) -> int | None:
    return next((i for config in configs for i in _ids(config.get(key))), None)


def _extra_special_tokens(config: Mapping[str, Any]) -> list[Any]:
    listed = config.get("additional_special_tokens") or []
    extra = config.get("extra_special_tokens") or []
    return [*listed, *(extra.values() if isinstance(extra, Mapping) else extra)]


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    path = folder / "added_tokens.json"
    added: dict[int, Mapping[str, Any]] = {}
    for content, token_id in _read_object(path).items():
        if type(token_id) is not int or token_id < 0:
            raise ValueError(f"{path}: token {content[:80]!r} has the id {str(token_id)[:80]!r}, expected a number")
        added[token_id] = {"content": content, "special": False}
    for token_id, token in (config.get("added_tokens_decoder") or {}).items():
        added[int(token_id)] = token
    return dict(sorted(added.items()))


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    elif isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None
