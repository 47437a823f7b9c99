"""What a chat template writes around the assistant's answers, learnt from how it renders a small chat."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from data.chat_guard import unused_characters
from data.chat_rendering import GuardedChat, render_chat

Render = Callable[..., str]  # render(messages, add_generation_prompt=...)

_THOUGHT = re.compile(r"[<\[][^<>\[\]\s]{0,24}(?:think|thought|reason)[^<>\[\]\s]{0,24}[>\]]", re.IGNORECASE)
_ID = "call00001"  # Mistral's templates want nine characters
_CALL = {"type": "function", "id": _ID, "function": {"name": "f", "arguments": {}}}
_CALLING: dict[str, Any] = {"tool_calls": [_CALL]}
_ANSWERING = {"tool_call_id": _ID, "name": "f"}


@dataclass(frozen=True)
class Frame:
    """What a template writes around an answer.

    header is between the message before (its end, where that is an answer too) and the answer. ends are the special
    tokens that end an answer; closed tells whether one of them ends that before a question, and the last. tail is what
    stands behind every answer where none does.
    """

    header: str
    ends: frozenset[str]
    closed: tuple[bool, bool]
    tail: str


def frame_behind(chat: GuardedChat, index: int, stops: frozenset[str]) -> Frame:
    """Learn the frame of an answer by its template's treatment of a small chat, else of the messages before it."""
    role = chat.messages[index - 1]["role"] if index else ""
    calling = bool(chat.messages[index].get("tool_calls"))
    parts = isinstance(chat.messages[index].get("content"), list)
    documents = {"documents": None} if chat.variables.get("documents") is not None else {}
    try:
        variables = json.dumps(dict(chat.variables) | documents, ensure_ascii=False)
        return _frame_of_role(chat.template, variables, role, calling, parts, chat.special, stops)
    except (TypeError, ValueError) as error:  # variables that are no JSON, a template that refuses the small chat
        if not index:
            raise ValueError(f"cannot tell where an answer begins that opens a chat: {error}") from error
    marks = tuple(islice(unused_characters((chat.template, chat.messages, chat.tools, chat.variables)), 3))

    def render(messages: Sequence[Mapping[str, Any]], **options: bool) -> str:
        return chat.render(_shape(messages, marks, parts), **options).text

    before = [*chat.messages[: index - 1], chat.messages[index - 1] | {"content": marks[0]}]
    return _learn_frame(render, before, marks, calling, chat.special, stops, None)


@functools.lru_cache(maxsize=256)
def _frame_of_role(
    template: str,
    variables: str,
    role: str,
    calling: bool,
    parts: bool,
    special: tuple[str, ...],
    stops: frozenset[str],
) -> Frame:
    """The frame of an answer, calling tools or not, behind a message of a role; the role "" stands for no message."""
    marks = tuple(islice(unused_characters((template, variables, role)), 3))

    def render(messages: Sequence[Mapping[str, Any]], **options: bool) -> str:
        messages = _shape(messages, (*marks, "", "x"), parts)
        return render_chat(messages, template=template, variables=json.loads(variables), **options).text

    question = {"role": "user", "content": "x"}
    if role in ("", "user", "system", "developer"):
        before = []
    else:
        before = [question] if role == "assistant" else [question, {"role": "assistant", "content": ""} | _CALLING]
    if role:
        before.append({"role": role, "content": marks[0]} | (_ANSWERING if len(before) > 1 else {}))
    usual = None
    if role in ("", "system", "developer"):
        usual = _frame_of_role(template, variables, "user", calling, parts, special, stops).header
    return _learn_frame(render, before, marks, calling, special, stops, usual)


def _shape(messages: Sequence[Mapping[str, Any]], own: Sequence[str], parts: bool) -> list[dict[str, Any]]:
    """Return the messages with their content as a list of parts, if asked for, where it is one of our own."""
    return [
        dict(message) | {"content": [{"type": "text", "text": message["content"]}]}
        if parts and message.get("content") in own
        else dict(message)
        for message in messages
    ]


def _learn_frame(
    render: Render,
    before: Sequence[Mapping[str, Any]],
    marks: tuple[str, ...],
    calling: bool,
    special: tuple[str, ...],
    stops: frozenset[str],
    usual: str | None,
) -> Frame:
    """Render an answer behind some messages, and look at what is around it.

    marks are what the last of the messages says, the answer, and the question that follows. `usual` is the header
    behind a question, whose ending serves where the template writes no prompt behind these messages.
    """
    a, b, c = marks
    answered = [*before, {"role": "assistant", "content": b}]
    whole = render(answered)
    gap, _, final = whole.rpartition(a)[2].partition(b)
    if whole.count(b) != 1:
        raise ValueError("the chat template does not write an answer once, so that no turn can be located")
    try:
        middle = render([*answered, {"role": "user", "content": c}]).partition(b)[2].partition(c)[0]
    except ValueError:
        middle = final
    ends = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
    ending = [match[0] if (match := ends.search(text)) else None for text in (middle, final)]
    known = stops | ({ending[1]} - {None})
    tail = _shared(*(ends.split(text)[0] for text in (middle, final)))
    tail = tail.rstrip() if tail.strip() else tail
    # A token that ends the last answer but not the others, while they are followed by one, leaves open where they end.
    closed = (ending[0] is not None and (ending[0] in known or ending[1] is not None), ending[1] is not None)
    if calling:
        with contextlib.suppress(ValueError):
            text = render([*before, answered[-1] | _CALLING])
            gap = text.rpartition(a)[2].partition(b)[0] if text.count(b) == 1 else gap
    header = _header(render, before, a, gap, usual)
    if before and before[-1]["role"] == "assistant":
        match = ends.search(header)
        header = header[match.end() :] if match and match[0] in known else header.removeprefix(tail)
    return Frame(header, frozenset(known), closed, tail)


def _header(render: Render, before: Sequence[Mapping[str, Any]], mark: str, gap: str, usual: str | None) -> str:
    """Return what of the gap between a message and an answer the assistant does not write."""
    gap = _up_to_thought(gap)
    try:
        prompted, plain = (render(before, add_generation_prompt=prompt) if before else "" for prompt in (True, False))
    except ValueError:
        prompted = plain = ""
    if prompted.count(mark) != 1:
        if usual is None:
            raise ValueError("the chat template writes no prompt for the assistant, so that no turn can be located")
        shared = _shared(usual.rstrip()[::-1], gap.rstrip()[::-1])[::-1]
        shared += _shared(*(text[len(text.rstrip()) :] for text in (usual, gap)))
        if not re.search(r"\w", shared):
            raise ValueError("the chat template begins a chat with the assistant in a way of its own")
        return shared
    prompt = _up_to_thought(prompted.partition(mark)[2])
    shared = _shared(prompt, gap)
    if prompted != plain or not gap[len(shared) :].strip():
        if len(shared) < len(prompt.rstrip()):
            raise ValueError(f"the chat template prompts with {prompt!r:.80} but writes {gap!r:.80} before an answer")
        return shared
    return gap.rstrip(" ")  # the template knows no prompts, and writes a header all the same


def _up_to_thought(text: str) -> str:
    match = _THOUGHT.search(text)
    return text[: match.start()] if match else text


def _shared(one: str, other: str) -> str:
    """Return what two texts begin with."""
    size = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:size]
