"""Tokenizers of LLaMA-family checkpoints: tiktoken, SentencePiece, tokenizer.json and byte-level BPE files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from models.llama import tokenizer_files as files
from models.llama.tokenizer_base import IncrementalDecoder

__all__ = ["IncrementalDecoder", "Tokenizer", "load_tokenizer"]


class Tokenizer(Protocol):
    """Text to token ids and back, with what a checkpoint says about its special tokens.

    vocab_size is the highest id + 1. adds_bos tells whether the checkpoint's convention puts BOS in front of a prompt;
    `encode` does it only when asked. stop_ids holds every id that ends a generation.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    adds_bos: bool
    stop_ids: frozenset[int]
    special_tokens: Mapping[str, int]
    chat_template: str | None

    def encode(self, text: str, *, add_bos: bool = False, allow_special: bool = False) -> list[int]:
        """Return the ids of a text, in which the names of special tokens are plain text unless allow_special is set.

        Added tokens that are not flagged special become single ids either way. Lone surrogates are read as U+FFFD.
        Raises ValueError if add_bos is asked of a tokenizer without BOS.
        """
        ...

    def decode(self, ids: Iterable[int], *, skip_special: bool = False, continuation: bool = False) -> str:
        """Return the text of some ids; a special token reads as its name unless skipped.

        SentencePiece-style tokenizers put a space in front of a text and decoding takes one away at the start;
        continuation keeps it, for ids that follow other text. An id without a token reads as U+FFFD.
        Raises ValueError for a negative id.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes that a token stands for in running text, which may be part of a character."""
        ...

    def decoder(self, *, skip_special: bool = False, continuation: bool = False) -> IncrementalDecoder:
        """Return a decoder for ids that arrive one by one."""
        ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint folder, or one tokenizer file with the settings found beside it.

    A folder is searched for tokenizer.json, tokenizer.model and vocab.json with merges.txt, in this order, then its
    sub-folder original/ likewise. What kind of file a tokenizer.model is shows in its content.
    Raises FileNotFoundError where there is none, ValueError for a file that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return _load_file(_find(path), settings_folder=path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder; expected a tokenizer file or a folder with one")
    return _load_file(path, settings_folder=path.parent)


def _find(folder: Path) -> Path:
    for place in (folder, folder / "original"):
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json"):
            if (place / name).is_file():
                return place / name
    raise FileNotFoundError(
        f"{folder}: no tokenizer; looked for tokenizer.json, tokenizer.model, and vocab.json with merges.txt, "
        "there and in original/"
    )


def _load_file(path: Path, *, settings_folder: Path) -> Tokenizer:
    from models.llama import tokenizer_huggingface, tokenizer_meta

    settings = files.read_settings(settings_folder)
    if settings_folder != path.parent and settings.exact_vocab_size is None:
        exact = files.read_settings(path.parent).exact_vocab_size
        settings = dataclasses.replace(settings, exact_vocab_size=exact)
    if path.name in ("vocab.json", "merges.txt"):
        return tokenizer_huggingface.load_byte_level_bpe(path.parent, settings)
    data = files.read_bytes(path)
    if data.lstrip()[:1] == b"{":
        return tokenizer_huggingface.load_tokenizer_json(data, path, settings)
    if files.looks_like_tiktoken(data):
        return tokenizer_meta.TiktokenTokenizer(data, path, settings)
    return tokenizer_meta.SentencePieceTokenizer(data, path, settings)
