"""Where the assistant writes in a rendered chat.

Templates with `{% generation %}` blocks say it. For others the chat is rendered a second time with a mark around what
each message says, which leads to the message's place whatever it says, and a small chat of the template's own tells
what it writes around an answer. A place that is not certain is an error.
"""

from __future__ import annotations

import contextlib
import functools
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.chat_frames import Frame, frame_behind
from data.chat_rendering import GuardedChat, RenderedChat

Span = tuple[int, int]  # characters [start, stop)

_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_SAID = ("content", "reasoning_content", "thinking", "reasoning")
_SPARED = (("calling",), ("calling", "assistant", "system"), None)  # None: all
_MAX_TAGS = 16  # at either end of a text that are left outside of its marks


def has_blocks(template: str) -> bool:
    return _BLOCK.search(template) is not None


def block_spans(chat: GuardedChat, rendered: RenderedChat, learn_from: int) -> list[Span]:
    """The `{% generation %}` blocks of messages[learn_from:]."""
    spans = list(rendered.assistant_spans)
    answers = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if not learn_from or not spans or not answers or answers[0] >= learn_from:
        return spans
    marked = _MarkedChat.of(chat, rendered)
    owners = [
        {index for index in answers if any(start <= place < stop for place in marked.places(index))}
        for start, stop in marked.rendered.assistant_spans
    ]
    if len(owners) == len(answers):  # a block each, also of those that say nothing
        owners = [owner or {index} for owner, index in zip(owners, answers, strict=True)]
    kept = [{index >= learn_from for index in owner} for owner in owners]
    if any(len(choice) != 1 for choice in kept):
        raise ValueError(f"cannot tell which generation blocks of the chat template belong to messages[{learn_from}:]")
    return [span for span, (choice,) in zip(spans, kept, strict=True) if choice]


def turn_spans(chat: GuardedChat, rendered: RenderedChat, stops: frozenset[str], learn_from: int) -> list[Span]:
    """The turns of the assistant in messages[learn_from:], of a template that has no blocks; stops are the names of
    special tokens that end a generation.
    """
    messages = chat.messages
    if not any(message["role"] == "assistant" for message in messages[learn_from:]):
        return []
    marked = _MarkedChat.of(chat, rendered)
    spans, end = [], 0
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            frame = frame_behind(chat, index, stops)
            start = _find_start(marked, index, end, frame.header)
            end = _find_end(marked, index, start, frame)
            if index >= learn_from:
                spans.append((marked.plain_place(start), marked.plain_place(end)))
    return spans


@dataclass(frozen=True)
class _MarkedChat:
    """A chat rendered with a mark, one character for each message, at both ends of what it says."""

    messages: list[dict[str, Any]]
    rendered: RenderedChat
    _places: list[list[int]]

    @classmethod
    def of(cls, chat: GuardedChat, rendered: RenderedChat) -> _MarkedChat:
        own = [chat.guard.free_character() for _ in chat.messages]
        gone = dict.fromkeys(map(ord, own))
        for marks, messages in _markings(chat.messages, own):
            with contextlib.suppress(ValueError):  # a template that refuses what is marked
                again = chat.render(messages)
                if again.text.translate(gone) == rendered.text:
                    return cls(chat.messages, again, _find_marks(again.text, marks))
        raise ValueError("the chat template decides by what messages say, so that its turns cannot be located")

    def places(self, index: int) -> list[int]:
        """Where the marks of a message stand."""
        return self._places[index]

    @functools.cached_property
    def _next(self) -> list[int]:
        ahead = [len(self.rendered.text)]
        for index in reversed(range(len(self.messages))):
            ahead.append(min([ahead[-1], *self.places(index)[:1]]))
        return ahead[::-1]

    def next_place(self, index: int) -> int:
        """Where the first mark of messages[index:] stands, else the end of the text."""
        return self._next[index]

    def plain_place(self, place: int) -> int:
        """Where a place is in the text without marks."""
        return place - bisect_left(self._sorted, place)

    @functools.cached_property
    def _sorted(self) -> list[int]:
        return sorted(place for places in self._places for place in places)


def _find_start(marked: _MarkedChat, index: int, end: int, header: str) -> int:
    """Return where an answer begins, behind the header; end is where the one before ended."""
    text, limit = marked.rendered.text, marked.next_place(index)
    before = marked.messages[index - 1] if index else None
    places = marked.places(index - 1) if index else []
    # Behind an answer, its end; else the last mark of the message before, and what of it is left outside.
    if before is None or before["role"] == "assistant" or not places:
        begin, rests = end, [""]
    else:
        begin, rests = places[-1] + 1, _rests(before)
    for wanted in dict.fromkeys((header, header.rstrip())):
        for rest in rests:
            if text.startswith(rest + wanted, begin):
                return _within(begin + len(rest + wanted), limit, index)
        if wanted.strip() and text.count(wanted, begin, limit) == 1:
            return _within(text.index(wanted, begin) + len(wanted), limit, index)
    raise _lost("begins", index)


def _find_end(marked: _MarkedChat, index: int, start: int, frame: Frame) -> int:
    """Return where an answer ends, behind what ends it."""
    text, limit = marked.rendered.text, marked.next_place(index + 1)
    message, places = marked.messages[index], marked.places(index)
    said = max(start, places[-1] + 1) if places else start
    if frame.ends and (match := re.compile("|".join(map(re.escape, frame.ends))).search(text, said, limit)):
        return match.end()
    last = index == len(marked.messages) - 1
    if frame.closed[last] or message.get("tool_calls"):
        raise _lost("ends", index)
    for rest in _rests(message):
        if text.startswith(rest + frame.tail, said):
            return _within(said + len(rest + frame.tail), limit, index)
    raise _lost("ends", index)


def _within(place: int, limit: int, index: int) -> int:
    if place > limit:
        raise _lost("is", index)
    return place


def _lost(what: str, index: int) -> ValueError:
    return ValueError(f"cannot tell where messages[{index}] {what} in the text of the chat template")


def _find_marks(text: str, marks: Sequence[str]) -> list[list[int]]:
    """Return where each message's mark stands; messages that share one have their turns with it in order."""
    found: dict[str, list[int]] = {mark: [] for mark in marks}
    for match in re.finditer(f"[{''.join(found)}]", text):
        found[match[0]].append(match.start())
    places = []
    seen: Counter[str] = Counter()
    sharing = Counter(marks)
    for mark in marks:
        each, over = divmod(len(found[mark]), sharing[mark])
        if over:
            raise ValueError("the chat template does not write equal messages alike")
        places.append(found[mark][each * seen[mark] :][:each])
        seen[mark] += 1
    return places


def _markings(
    messages: Sequence[Mapping[str, Any]], own: Sequence[str]
) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """Yield marks, and the messages with them, most of them first: those in texts of only spaces and tags are left out
    step by step, since a template may ask for such; last with one mark for equal messages, which it may compare.
    """
    tried: list[list[dict[str, Any]]] = []
    for alike in (False, True):
        marks = [own[messages.index(message)] for message in messages] if alike else list(own)
        for spared in _SPARED:
            marked = []
            for message, mark in zip(messages, marks, strict=True):
                kind = "calling" if message.get("tool_calls") else message["role"]
                empty = spared is not None and kind not in spared
                texts = {key: _mark(message[key], mark, empty) for key in _SAID if key in message}
                marked.append(dict(message) | texts)
            if marked not in tried:
                tried.append(marked)
                yield marks, marked


def _mark(value: Any, mark: str, empty: bool) -> Any:
    """Put a mark at both ends of a text or of the texts in a list of parts, within the spaces and tags around it."""
    if isinstance(value, list):
        return [
            part | {"text": _mark(part["text"], mark, empty)}
            if isinstance(part, dict) and isinstance(part.get("text"), str)
            else part
            for part in value
        ]
    if not isinstance(value, str):
        return value
    start, stop = _inner(value)
    if start == stop:
        return mark + value if empty else value
    return f"{value[:start]}{mark}{value[start:stop]}{mark}{value[stop:]}"


def _inner(text: str) -> Span:
    """Return where a text begins and ends without the spaces and tags around it."""
    start, stop = 0, len(text)
    for _ in range(_MAX_TAGS):
        start = stop - len(text[start:stop].lstrip())
        end = text.find(">", start, stop)
        if end < 0 or text[start] != "<" or text.find("<", start + 1, end) >= 0:
            break
        start = end + 1
    for _ in range(_MAX_TAGS):
        stop = start + len(text[start:stop].rstrip())
        begin = text.rfind("<", start, stop)
        if begin < 0 or text[stop - 1] != ">" or text.find(">", begin, stop - 1) >= 0:
            break
        stop = begin
    return start, stop


def _rests(message: Mapping[str, Any]) -> list[str]:
    """What may stand behind the last mark of a message, or in its place where it has none."""
    content = message.get("content")
    if not isinstance(content, str):
        return [""]
    rest = content[_inner(content)[1] :] if _inner(content)[0] < _inner(content)[1] else content
    return list(dict.fromkeys((rest, rest.rstrip(), rest.strip(), "")))
