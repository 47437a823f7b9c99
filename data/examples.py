"""Records to token ids, with what of them is to be learnt."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data.chat import encode_chat_with_mask
from data.chat_spans import SpanTokenizer
from data.records import ChatRecord, CompletionRecord, PreferenceRecord, Record, TextRecord

__all__ = ["Example", "tokenize"]


class Example(NamedTuple):
    """A document, or a piece of one that goes on in the next example unless last.

    tokens is [n] int32; mask is [n] bool, True where the token is to be predicted from those before it.
    """

    tokens: np.ndarray
    mask: np.ndarray
    last: bool = True


def tokenize(record: Record, tokenizer: SpanTokenizer, *, template: str | None = None) -> Example:
    """Tokenise a record; the template is for chats, by default the tokenizer's own.

    Of a text everything is learnt, of a prompt with its completion the completion, of a chat what the assistant says.
    BOS goes in front by the tokenizer's convention, EOS behind texts and completions where there is one; both only at
    the ends of a text that comes in pieces. Raises ValueError for a chat that the template refuses, and for a
    preference, which is two documents.
    """
    match record:
        case TextRecord():
            return _text(record, tokenizer)
        case CompletionRecord():
            return _completion(record, tokenizer)
        case ChatRecord():
            chat = encode_chat_with_mask(
                tokenizer, record.messages, template=template, tools=record.tools, learn_from=record.learn_from
            )
            return Example(np.array(chat.ids, np.int32), np.array(chat.mask, bool))
        case PreferenceRecord():
            raise ValueError("a preference (chosen and rejected) is two texts, not one to learn")
    raise TypeError(f"expected a record, got {type(record).__name__}")


def _text(record: TextRecord, tokenizer: SpanTokenizer) -> Example:
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and record.first else []
    eos = [tokenizer.eos_id] if tokenizer.eos_id is not None and record.last else []
    encode = tokenizer.encode if record.first else lambda text: _encode_behind(text, tokenizer)
    tokens = np.array([*bos, *encode(record.text), *eos], np.int32)
    return Example(tokens, np.ones(len(tokens), bool), record.last)


def _completion(record: CompletionRecord, tokenizer: SpanTokenizer) -> Example:
    prompt, whole = tokenizer.encode(record.prompt), tokenizer.encode(record.prompt + record.completion)
    continues = whole[: len(prompt)] == prompt
    completion = whole[len(prompt) :] if continues else _encode_behind(record.completion, tokenizer)
    before = [tokenizer.bos_id, *prompt] if tokenizer.adds_bos else prompt
    behind = completion if tokenizer.eos_id is None else [*completion, tokenizer.eos_id]
    mask = np.zeros(len(before) + len(behind), bool)
    mask[len(before) :] = True
    return Example(np.array([*before, *behind], np.int32), mask)


def _encode_behind(text: str, tokenizer: SpanTokenizer) -> list[int]:
    """Encode text that goes on from other text: without the space that some tokenizers put in front of a whole one."""
    newline, ids = tokenizer.encode("\n"), tokenizer.encode("\n" + text)
    return ids[len(newline) :] if ids[: len(newline)] == newline else tokenizer.encode(text)
