"""Conversations to text, through the Jinja chat templates of Hugging Face checkpoints."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from data.chat_guard import Guard, unused_characters
from data.chat_sandbox import CLOSING, OPENING, run_template

NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})
_REASONING = ("reasoning_content", "thinking", "reasoning")


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
    variables: Mapping[str, Any] = NO_VARIABLES,
) -> RenderedChat:
    """Render messages with a chat template, in a sandbox.

    tools are JSON schemas. variables are what else the template may read: bos_token, documents, enable_thinking, ...
    continue_final_message ends the text where the content of the last message ends. A reasoning under any of the names
    reasoning_content, thinking and reasoning is offered as the first two of them. Raises ValueError for messages that
    are no chat, with the template's own words where it refuses them, and for a template that fails.
    """
    messages, tools = checked(messages), plain(tools, "tools")
    if continue_final_message and add_generation_prompt:
        raise ValueError("continue_final_message and add_generation_prompt exclude each other")
    messages = [_with_reasoning(message) for message in messages]
    marks = unused_characters((template, messages, tools, variables))
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


@dataclass(frozen=True, kw_only=True)
class GuardedChat:
    """A chat for a template, with the names of special tokens in its strings hidden."""

    template: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None
    variables: Mapping[str, Any]
    guard: Guard
    special: tuple[str, ...]

    def render(self, messages: Sequence[Mapping[str, Any]] | None = None, **options: bool) -> RenderedChat:
        return render_chat(
            self.messages if messages is None else messages,
            template=self.template,
            tools=self.tools,
            variables=self.variables,
            **options,
        )


def checked(messages: Any) -> list[dict[str, Any]]:
    """Return a copy of the messages made of plain JSON types, without their None: most templates ask what is there."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages must be a non-empty list of mappings, got {messages!r:.80}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{index}] must be a mapping with a string role, got {message!r:.80}")
    return [
        {name: value for name, value in message.items() if value is not None} for message in plain(messages, "messages")
    ]


def plain(value: Any, where: str) -> Any:
    """Rebuild a value from plain JSON types, so that a template gets no object with methods of its own."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {plain(key, where): plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise ValueError(f"{where} is a {type(value).__name__}, expected a JSON value")


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
