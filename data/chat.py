"""Conversations to text and to token ids, through the Jinja chat templates of Hugging Face checkpoints."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from data.chat_sandbox import CLOSING, OPENING, run_template
from data.chat_templates import CHAT_TEMPLATES

__all__ = ["CHAT_TEMPLATES", "RenderedChat", "choose_template", "encode_chat", "render_chat"]

_NONE: Mapping[str, Any] = MappingProxyType({})
_PRIVATE_USE = range(0xF0000, 0xFFFFE)
_REASONING = ("reasoning_content", "thinking", "reasoning")


class _ChatTokenizer(Protocol):
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
class RenderedChat:
    """A chat as one text; assistant_spans are the character ranges [start, end) of its `{% generation %}` blocks."""

    text: str
    assistant_spans: tuple[tuple[int, int], ...]


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] = _NONE,
) -> RenderedChat:
    """Render messages with a chat template, in a sandbox.

    tools are JSON schemas. variables are what else the template may read: bos_token, documents, enable_thinking, ...
    continue_final_message ends the text where the content of the last message ends. A reasoning under any of the names
    reasoning_content, thinking and reasoning is offered as the first two of them. Raises ValueError for messages that
    are no chat, with the template's own words where it refuses them, and for a template that fails.
    """
    messages, tools = _checked(messages), _plain(tools, "tools")
    if continue_final_message and add_generation_prompt:
        raise ValueError("continue_final_message and add_generation_prompt exclude each other")
    messages = [_with_reasoning(message) for message in messages]
    marks = _unused_characters((template, messages, tools, variables))
    opening, closing, end = itertools.islice(marks, 3)
    final = _mark_end(messages[-1], end) if continue_final_message else ""
    text = run_template(
        template,
        {"documents": None}
        | dict(variables)
        | {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        | {OPENING: opening, CLOSING: closing},
    )
    text, spans = _take_spans(text, opening, closing)
    if continue_final_message:
        text = _cut(text, end, final)
        spans = [(min(start, len(text)), min(stop, len(text))) for start, stop in spans]
    return RenderedChat(text, tuple(spans))


def encode_chat(
    tokenizer: _ChatTokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] = _NONE,
    add_bos: bool | None = None,
) -> list[int]:
    """Return the ids of a chat, in which only the template can write special tokens.

    A special token's name in any string of messages, tools and variables["documents"] is encoded as plain text, so
    nobody forges a turn; added tokens that are not flagged special, such as `<think>`, stay single ids. The template
    defaults to the tokenizer's, and reads bos_token, eos_token and pad_token. BOS goes in front if add_bos, but never a
    second time; None leaves it to the tokenizer's own template, as transformers does, and with any other template
    follows the tokenizer's convention for texts. Raises ValueError as `render_chat` does.

    While the template runs, each such name is one private-use character. Limits: a template that compares content with
    a special token's name does not see it; one that deletes from the middle of a string may join what is left of it to
    a name; a format whose turns are ordinary text, such as `[INST]`, cannot be protected; and where a special token is
    set to swallow the spaces around it, those beside a text with such a name are kept.
    """
    template = tokenizer.chat_template if template is None else template
    if template is None:
        raise ValueError(f"the tokenizer has no chat template; pass one, such as those of {sorted(CHAT_TEMPLATES)}")
    messages, tools = _checked(messages), _plain(tools, "tools")
    variables = _token_names(tokenizer) | dict(variables)
    documents = _plain(variables.get("documents"), "documents")
    guard = _Guard(tuple(tokenizer.special_tokens), (template, messages, tools, variables))
    text = render_chat(
        guard.hide(messages),
        template=template,
        tools=guard.hide(tools),
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        variables=variables | {"documents": guard.hide(documents)},
    ).text
    ids = guard.encode(text, tokenizer)
    if add_bos is None:
        add_bos = tokenizer.adds_bos and template != tokenizer.chat_template
    if add_bos:
        if tokenizer.bos_id is None:
            raise ValueError("add_bos asked of a tokenizer that has no BOS token")
        ids = ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]
    return ids


def choose_template(tokenizer: _ChatTokenizer, name: str | None = None) -> str:
    """The template for a checkpoint: the built-in one or file of that name, else the tokenizer's own, else the
    built-in one that its special tokens point to, else `qa`. Raises ValueError for a name that is neither.
    """
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    if name is not None:
        if not Path(name).is_file():
            raise ValueError(f"chat template {name!r} is neither a file nor one of {', '.join(CHAT_TEMPLATES)}")
        return Path(name).read_text(encoding="utf-8")
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    if "<|eot_id|>" in tokenizer.special_tokens:
        return CHAT_TEMPLATES["llama3"]
    return CHAT_TEMPLATES["chatml" if "<|im_start|>" in tokenizer.special_tokens else "qa"]


class _Guard:
    """Hides the names of special tokens from a template, and encodes what it makes of them as plain text.

    A name is replaced by one character of its own. Behind a string that ends with the beginning of a name stands a
    seam, so that strings which a template puts side by side do not join to a name either.
    """

    def __init__(self, names: tuple[str, ...], strings: Any):
        self._pattern, self._beginnings, self._longest = _name_patterns(names)
        self._free = _unused_characters(strings)
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

    def encode(self, text: str, tokenizer: _ChatTokenizer) -> list[int]:
        joined = text.replace(self._seam, "")
        if len(self._pattern.findall(joined)) == len(self._pattern.findall(text)):
            text = joined
        names = {character: name for name, character in self._hidden.items()} | {self._seam: ""}
        own = re.compile("[" + "".join(names) + "]")
        ids: list[int] = []
        clean, before = "", ""
        for position, part in enumerate(self._pattern.split(text)):
            if position % 2 or not own.search(part):
                clean += part
                before = part if position % 2 else before
            else:
                ids += tokenizer.encode(clean, allow_special=True)
                ids += _encode_plain(own.sub(lambda match: names[match[0]], part), before, tokenizer)
                clean = ""
        return ids + tokenizer.encode(clean, allow_special=True)

    def _character(self, name: str) -> str:
        if name not in self._hidden:
            self._hidden[name] = next(self._free)
        return self._hidden[name]


@functools.lru_cache(maxsize=16)
def _name_patterns(names: tuple[str, ...]) -> tuple[re.Pattern[str], frozenset[str], int]:
    """Return a pattern of the names, longest first, their proper beginnings, and the length of the longest."""
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"
    beginnings = frozenset(name[:size] for name in names for size in range(1, len(name)))
    return re.compile(f"({pattern})"), beginnings, max(map(len, names), default=0)


def _encode_plain(text: str, before: str, tokenizer: _ChatTokenizer) -> list[int]:
    """Encode text without special tokens as it would be encoded behind the special token `before`, if there is one.

    Some SentencePiece tokenizers put a space in front of a whole text but not behind a special token.
    """
    if not before or tokenizer.encode(before + "a", allow_special=True)[1:] == tokenizer.encode("a"):
        return tokenizer.encode(text)
    newline, ids = tokenizer.encode("\n"), tokenizer.encode("\n" + text)
    return ids[len(newline) :] if ids[: len(newline)] == newline else tokenizer.encode(text)


def _token_names(tokenizer: _ChatTokenizer) -> dict[str, str]:
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    return {
        variable: names[token_id] if token_id in names else tokenizer.decode([token_id])
        for variable, token_id in ids.items()
        if token_id is not None
    }


def _checked(messages: Any) -> list[dict[str, Any]]:
    """Return a copy of the messages made of plain JSON types."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages must be a non-empty list of mappings, got {messages!r:.80}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{index}] must be a mapping with a string role, got {message!r:.80}")
    return _plain(messages, "messages")


def _plain(value: Any, where: str) -> Any:
    """Rebuild a value from plain JSON types, so that a template gets no object with methods of its own."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise ValueError(f"{where} is a {type(value).__name__}, expected a JSON value")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from itertools.chain(_strings(key), _strings(item))
    elif isinstance(value, (list, tuple)):
        yield from itertools.chain.from_iterable(map(_strings, value))


def _unused_characters(value: Any) -> Iterator[str]:
    """Yield private-use characters that occur in no string of the value."""
    used = set().union(*_strings(value))
    return (character for character in map(chr, _PRIVATE_USE) if character not in used)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning} | message | {"reasoning_content": reasoning}


def _mark_end(message: dict[str, Any], end: str) -> str:
    """Put a mark and a space behind the message's content, in place, and return the content."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [message]
    key = "text" if isinstance(content, list) else "content"
    for part in reversed(parts):
        if isinstance(part, dict) and isinstance(part.get(key), str):
            text = part[key]
            part[key] = f"{text}{end} "
            return text
    raise ValueError("continue_final_message: the last message has no text to continue")


def _cut(text: str, end: str, content: str) -> str:
    """End a text at its mark; where the template trimmed the space behind the mark, it would trim what is before it."""
    if end not in text or content.strip() not in text:
        raise ValueError("continue_final_message: the template does not write the content of the last message")
    position = text.rindex(end)
    return text[:position] if text.startswith(end + " ", position) else text[:position].rstrip()


def _take_spans(text: str, opening: str, closing: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the text without its marks, and where they were."""
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    starts: list[int] = []
    length = 0
    for part in re.split(f"([{opening}{closing}])", text):
        if part == opening:
            starts.append(length)
        elif part == closing and starts:
            spans.append((starts.pop(), length))
        elif part != closing:
            parts.append(part)
            length += len(part)
    return "".join(parts), spans
