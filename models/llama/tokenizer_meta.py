"""The two formats of Meta's tokenizer.model: SentencePiece (Llama 1 and 2) and tiktoken (Llama 3)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from models.llama import tokenizer_files as files
from models.llama.tokenizer_base import SPACE_MARK, BytesTokenizer, alternation
from models.llama.tokenizer_files import TokenizerSettings

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
    *(f"<|reserved_special_token_{number}|>" for number in range(2, 246)),
)
_MAX_PIECE = 400_000
_MAX_RUN = 25_000


class TiktokenTokenizer(BytesTokenizer):
    """Meta's tokenizer.model of Llama 3: ranked byte sequences, followed by 256 special tokens.

    As in Meta's code over-long text is cut before encoding (see `split_long_text`), here after special tokens have been
    taken out, so that no special token is ever cut. Source: github.com/meta-llama/llama-models, llama3/tokenizer.py.
    """

    def __init__(self, data: bytes, path: Path, settings: TokenizerSettings):
        import tiktoken

        ranks = files.parse_tiktoken_ranks(data, path)
        names = {len(ranks) + offset: name for offset, name in enumerate(LLAMA3_SPECIAL_TOKENS)}
        size = len(names) + len(ranks)
        if settings.exact_vocab_size not in (None, size):
            raise ValueError(f"{path}: {size} tokens, but params.json says vocab_size {settings.exact_vocab_size}")
        names.update((i, token["content"]) for i, token in settings.added_tokens.items() if i >= len(ranks))
        special = {name: i for i, name in names.items()}
        ends = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
        super().__init__(
            settings,
            vocab_size=max(names) + 1,
            special_tokens=special,
            find=special.get,
            bos_id=special.get("<|begin_of_text|>"),
            eos_id=special.get("<|end_of_text|>"),
            pad_id=special.get("<|finetune_right_pad_id|>"),
            adds_bos=True,
            stop_ids=[special[name] for name in ends if name in special],
        )
        self._encoding = tiktoken.Encoding(path.name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
        self._tokens = [*ranks]
        self._names = names
        self._special = alternation(special)

    def _encode(self, text: str, allow_special: bool) -> list[int]:
        ids: list[int] = []
        for position, part in enumerate(self._special.split(text) if allow_special else [text]):
            if position % 2:
                ids.append(self.special_tokens[part])
            else:
                for piece in split_long_text(part):
                    ids.extend(self._encoding.encode_ordinary(piece))
        return ids

    def _lookup(self, token_id: int) -> bytes | None:
        if token_id < len(self._tokens):
            return self._tokens[token_id]
        return self._names[token_id].encode() if token_id in self._names else None


class SentencePieceTokenizer(BytesTokenizer):
    """A SentencePiece model, as Llama 1 and 2 have it, with the added tokens that the files beside it list.

    Text between two special tokens is encoded like a text of its own, with a space in front.
    """

    def __init__(self, data: bytes, path: Path, settings: TokenizerSettings):
        import sentencepiece

        files.check_sentencepiece(data, path)
        model = sentencepiece.SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(data)
        except RuntimeError as error:
            raise ValueError(f"{path}: not a readable SentencePiece model: {error}") from error
        self._model = model
        base = range(model.vocab_size())
        own = {model.id_to_piece(i): i for i in base if model.is_control(i) or model.is_unknown(i)}
        added = {token["content"]: i for i, token in settings.added_tokens.items() if i >= len(base)}
        named = {settings.bos_token, settings.eos_token, settings.pad_token, *settings.extra_special_tokens}
        flagged = {token["content"] for token in settings.added_tokens.values() if token.get("special")}
        special = own | {name: i for name, i in added.items() if name in flagged | named}
        self._added = added | own

        def find(name: str) -> int | None:
            found = self._added.get(name, model.piece_to_id(name))
            return found if name in self._added or model.id_to_piece(found) == name else None

        super().__init__(
            settings,
            vocab_size=max([len(base) - 1, *added.values()]) + 1,
            special_tokens=special,
            find=find,
            bos_id=model.bos_id() if model.bos_id() >= 0 else None,
            eos_id=model.eos_id() if model.eos_id() >= 0 else None,
            pad_id=model.pad_id() if model.pad_id() >= 0 else None,
            adds_bos=True,
        )
        self._all = alternation(self._added)
        self._plain = alternation(added.keys() - special.keys())
        self._strips_space = model.encode("x", out_type=str)[0].startswith(SPACE_MARK)

    def _encode(self, text: str, allow_special: bool) -> list[int]:
        ids: list[int] = []
        for position, part in enumerate((self._all if allow_special else self._plain).split(text)):
            if position % 2:
                ids.append(self._added[part])
            elif part:
                ids.extend(self._model.encode(part))
        return ids

    def _lookup(self, token_id: int) -> bytes | None:
        if token_id >= self._model.vocab_size():
            return next((name.encode() for name, i in self._added.items() if i == token_id), None)
        piece = self._model.id_to_piece(token_id)
        return (
            bytes([int(piece[3:-1], 16)]) if self._model.is_byte(token_id) else piece.replace(SPACE_MARK, " ").encode()
        )


def split_long_text(text: str) -> Iterator[str]:
    """Cut a text into pieces of at most 400,000 characters with no run of more than 25,000 (non-)spaces.

    A run that is too long is cut every 25,000 characters, counted from its own start or that of its piece.
    """
    if len(text) <= _MAX_RUN:
        yield text
        return
    for offset in range(0, len(text), _MAX_PIECE):
        piece, start = text[offset : offset + _MAX_PIECE], 0
        for run in re.finditer(r"\S+|\s+", piece):
            for end in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                yield piece[start:end]
                start = end
        yield piece[start:]
