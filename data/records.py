"""What a row of training data is, whichever of the usual formats it was written in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from data.records_messages import Message, parse_message, parse_messages, parse_tools

__all__ = [
    "FORMATS",
    "BadRow",
    "ChatRecord",
    "CompletionRecord",
    "PreferenceRecord",
    "PromptRecord",
    "Record",
    "TextRecord",
    "UnpairedRecord",
    "normalize",
    "normalize_preference",
    "normalize_prompt",
]


_T = TypeVar("_T")


class BadRow(ValueError):  # noqa: N818
    """A row that cannot be read or fits no format; the message is "path:line: why"."""


@dataclass(frozen=True, kw_only=True)
class TextRecord:
    """Text to learn all of. first and last say whether it begins and ends its document: pieces of one document follow
    each other, and joined without anything between them they are its text.
    """

    text: str
    first: bool = True
    last: bool = True


@dataclass(frozen=True, kw_only=True)
class ChatRecord:
    """A conversation, of which assistant messages are learnt, those from messages[learn_from] on.

    Messages are as `parse_messages` makes them, tools as `parse_tools`.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    learn_from: int = 0


@dataclass(frozen=True, kw_only=True)
class CompletionRecord:
    """Text of which the completion is learnt; it follows the prompt without anything between them."""

    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class PreferenceRecord:
    """Two answers to one prompt. All three are text, or all three messages: those of the answers follow the prompt's,
    and begin with an assistant message. `margin` says by how much the chosen one is better, where the row does.
    """

    prompt: tuple[Message, ...] | str
    chosen: tuple[Message, ...] | str
    rejected: tuple[Message, ...] | str
    tools: tuple[Mapping[str, Any], ...] | None = None
    margin: float | None = None


@dataclass(frozen=True, kw_only=True)
class UnpairedRecord:
    """One answer to a prompt, and whether it is a good one. Both are text, or both messages: those of the completion
    follow the prompt's, and the assistant says at least one of them.
    """

    prompt: tuple[Message, ...] | str
    completion: tuple[Message, ...] | str
    desirable: bool
    tools: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class PromptRecord:
    """What a model is asked, text or messages, and the text of an answer where the row has one."""

    prompt: tuple[Message, ...] | str
    answer: str | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None


Record = TextRecord | ChatRecord | CompletionRecord | PreferenceRecord


def normalize(row: Mapping[str, Any], *, format: str | None = None) -> Record:
    """Return the record that a row stands for.

    The format is told by the keys, and must be named where they fit more than one; keys without a part in it are
    ignored, and a key with null counts as absent:

    - text: `text` -> TextRecord, with the booleans `first` and `last` where the row has both;
    - messages, conversations: lists in role/content or ShareGPT's from/value -> ChatRecord;
    - completion: `prompt` and `completion`, both text -> CompletionRecord; both messages -> ChatRecord that learns
      from the first message of the completion on, as TRL does;
    - preference: `chosen` and `rejected`, with the prompt in `prompt`, `conversations`, `messages`, `instruction` (and
      `input`, `history`) or `question`, or else in what the two have in common -> PreferenceRecord, with the number
      `margin` where the row has one;
    - alpaca: `instruction`, `output`, and optionally `input`, `history` (pairs of user and assistant) -> ChatRecord
      whose user message is the instruction, a newline and the input, or the one of them that is not empty;
    - question: `question` and `answer` -> ChatRecord, so that a chat template (`qa`) puts something between them.

    Conversations take `system`, text that becomes their first message, and `tools`. Nothing in the texts is
    interpreted. Deviations from TRL: a prompt that chosen and rejected texts share ends before a white space, not in
    the middle of a word, and unpaired preferences (`label`) are refused rather than learnt; `normalize_preference`
    reads them. Raises ValueError, one line with the row's keys, for a row that fits no format or several, and for
    values of the wrong types.
    """
    return _parsed(row, lambda given: _FORMATS[_choose(given, format)][1](given))


def normalize_prompt(row: Mapping[str, Any], *, format: str | None = None) -> PromptRecord:
    """Return the prompt that a row stands for, with or without an answer to it.

    A `prompt`, text or messages, is taken as it is whatever else the row has, as TRL does, and a `completion` is the
    answer to it. With `chosen` and `rejected`, without a `prompt`, or with a named format, the row is read as by
    `normalize`. A conversation that ends with the assistant's messages is a prompt without them, and their last is the
    answer; `question` and `instruction` need no answer. Raises ValueError as `normalize` does, and for rows of text.
    """

    def parse(given: Mapping[str, Any]) -> PromptRecord:
        if format is None and "prompt" in given and not given.keys() >= {"chosen", "rejected"}:
            return _given_prompt(given)
        if format is None and not any(given.keys() >= set(keys) for keys, _ in _FORMATS.values()):
            if not given.keys() & _UNANSWERED.keys():
                raise ValueError("the row has no prompt (prompt, question, instruction, messages, conversations)")
            given = {**given, **{key: "" for asked, key in _UNANSWERED.items() if asked in given}}
        return _asking(_FORMATS[_choose(given, format)][1](given))

    return _parsed(row, parse)


def normalize_preference(row: Mapping[str, Any], *, format: str | None = None) -> PreferenceRecord | UnpairedRecord:
    """Return the preference that a row stands for: two answers, or one and whether it is good.

    The latter is `label` or `kto_tag`, true or false, in a row of any other format with an answer: of a conversation,
    the assistant's messages at its end. Raises ValueError as `normalize` does, and for rows that prefer nothing.
    """

    def parse(given: Mapping[str, Any]) -> PreferenceRecord | UnpairedRecord:
        if len(found := given.keys() & {"chosen", "rejected"}) == 1:
            raise ValueError(f"{'rejected' if 'chosen' in found else 'chosen'} is missing, the other answer of a pair")
        untagged = {key: value for key, value in given.items() if key not in _TAGS}
        record = _FORMATS[_choose(untagged, format)][1](untagged)
        if isinstance(record, PreferenceRecord):
            return replace(record, margin=_margin(given))
        return _tagged(record, given)

    return _parsed(row, parse)


def _parsed(row: Mapping[str, Any], parse: Callable[[Mapping[str, Any]], _T]) -> _T:
    """Return what the row without its nulls is parsed to. Raises ValueError with the row's keys."""
    if not isinstance(row, Mapping):
        raise ValueError(f"a row must be an object, got {type(row).__name__}")
    try:
        return parse({key: value for key, value in row.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"{error}; the row has the keys {_listed(row)}") from error


def _choose(row: Mapping[str, Any], format: str | None) -> str:
    """Return the name of the one format whose keys the row has."""
    if format is not None:
        if format not in _FORMATS:
            raise ValueError(f"unknown format {format!r}, expected one of {list(_FORMATS)}")
        if missing := [key for key in _FORMATS[format][0] if key not in row]:
            raise ValueError(f"format {format} needs {' and '.join(missing)}")
        return format
    fitting = [name for name, (keys, _) in _FORMATS.items() if row.keys() >= set(keys)]
    if "preference" in fitting:
        fitting = [name for name in fitting if name not in ("messages", "conversations")]
    if not fitting:
        raise ValueError(f"the row fits no format ({'; '.join(' + '.join(keys) for keys, _ in _FORMATS.values())})")
    if len(fitting) > 1:
        raise ValueError(f"the row fits the formats {', '.join(fitting)}; name one as the format")
    return fitting[0]


def _text(row: Mapping[str, Any]) -> TextRecord:
    flags = {key: row.get(key) for key in ("first", "last")}
    is_piece = all(isinstance(flag, bool) for flag in flags.values())
    return TextRecord(text=_string(row, "text"), **(flags if is_piece else {}))


def _chat(row: Mapping[str, Any], key: str) -> ChatRecord:
    messages = _with_system(row, parse_messages(row[key], key))
    return ChatRecord(messages=messages, tools=_conversation_tools(row))


def _completion(row: Mapping[str, Any]) -> CompletionRecord | ChatRecord:
    for key in _TAGS:
        if key in row:
            raise ValueError(f"prompt and completion with {key}: unpaired preferences are not texts to learn")
    if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        _check_no_conversation(row)
        return CompletionRecord(prompt=row["prompt"], completion=row["completion"])
    if isinstance(row["prompt"], str) or isinstance(row["completion"], str):
        raise ValueError("prompt and completion must both be text or both be messages")
    prompt = _with_system(row, parse_messages(row["prompt"], "prompt"))
    completion = _answer(row["completion"], "completion")
    if all(message["role"] != "assistant" for message in completion):
        raise ValueError("completion has no assistant message")
    return ChatRecord(messages=prompt + completion, tools=_conversation_tools(row), learn_from=len(prompt))


def _alpaca(row: Mapping[str, Any]) -> ChatRecord:
    answer = {"role": "assistant", "content": _string(row, "output")}
    return ChatRecord(messages=_with_system(row, (*_instruction(row), answer)), tools=_conversation_tools(row))


def _question(row: Mapping[str, Any]) -> ChatRecord:
    if row.get("context"):
        raise ValueError("question and answer with context: nothing says how to join them")
    answer = {"role": "assistant", "content": _string(row, "answer")}
    return ChatRecord(messages=_with_system(row, (*_asked(row), answer)), tools=_conversation_tools(row))


def _preference(row: Mapping[str, Any]) -> PreferenceRecord:
    prompt, chosen, rejected = _prompt(row), row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("chosen and rejected must both be text or both be messages")
    if isinstance(chosen, str) and (prompt is None or isinstance(prompt, str)):
        _check_no_conversation(row)
        if prompt is None:
            prompt, chosen, rejected = _split_texts(chosen, rejected)
        return PreferenceRecord(prompt=prompt, chosen=chosen, rejected=rejected)
    chosen, rejected = _answer(chosen, "chosen"), _answer(rejected, "rejected")
    if prompt is None or isinstance(prompt, str):
        prompt, chosen, rejected = _split_conversations(prompt, chosen, rejected)
    elif _begins(chosen, prompt) and _begins(rejected, prompt):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[0]["role"] != "assistant":
            found = f"begins with a {answer[0]['role']} message" if answer else "is empty"
            raise ValueError(f"{key} must go on from the prompt with an assistant message, but {found}")
    prompt, tools = _with_system(row, prompt), _conversation_tools(row)
    return PreferenceRecord(prompt=prompt, chosen=chosen, rejected=rejected, tools=tools)


def _margin(row: Mapping[str, Any]) -> float | None:
    margin = row.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or margin != margin:
        raise ValueError(f"margin must be a number, got {margin!r:.80}")
    if abs(margin) > _LARGEST_MARGIN:
        raise ValueError(f"margin {margin!r:.80} is too large")
    return float(margin)


def _tagged(record: TextRecord | CompletionRecord | ChatRecord, row: Mapping[str, Any]) -> UnpairedRecord:
    tags = [key for key in _TAGS if key in row]
    if len(tags) != 1:
        raise ValueError(f"a preference has chosen and rejected, or one of {' and '.join(_TAGS)}")
    desirable = row[tags[0]]
    if not isinstance(desirable, bool):
        raise ValueError(f"{tags[0]} must be true or false, got {desirable!r:.80}")
    match record:
        case CompletionRecord():
            return UnpairedRecord(prompt=record.prompt, completion=record.completion, desirable=desirable)
        case ChatRecord():
            prompt, completion = _asked_and_answered(record)
            if not completion:
                raise ValueError("the conversation does not end with an answer of the assistant")
            return UnpairedRecord(prompt=prompt, completion=completion, desirable=desirable, tools=record.tools)
    raise ValueError("a text has no prompt")


def _given_prompt(row: Mapping[str, Any]) -> PromptRecord:
    answer = _last_said(_answer(row["completion"], "completion")) if "completion" in row else None
    if isinstance(row["prompt"], str):
        _check_no_conversation(row)
        return PromptRecord(prompt=row["prompt"], answer=answer)
    messages = _with_system(row, parse_messages(row["prompt"], "prompt"))
    return PromptRecord(prompt=messages, answer=answer, tools=_conversation_tools(row))


def _asking(record: Record) -> PromptRecord:
    """Return a record without what would be learnt of it."""
    match record:
        case CompletionRecord():
            return PromptRecord(prompt=record.prompt, answer=record.completion or None)
        case PreferenceRecord():
            return PromptRecord(prompt=record.prompt, tools=record.tools)
        case ChatRecord():
            prompt, answer = _asked_and_answered(record)
            return PromptRecord(prompt=prompt, answer=_last_said(answer), tools=record.tools)
    raise ValueError("a text has no prompt")


def _asked_and_answered(record: ChatRecord) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Split a chat before what is learnt of it, or else before the assistant's messages at its end."""
    end = record.learn_from or len(record.messages)
    while end and not record.learn_from and record.messages[end - 1]["role"] == "assistant":
        end -= 1
    if not end:
        raise ValueError("the assistant speaks first, so that nothing is asked")
    return record.messages[:end], record.messages[end:]


def _last_said(messages: tuple[Message, ...]) -> str | None:
    """Return what the assistant's last message says, None where that is nothing."""
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    return said[-1] or None if said else None


_PROMPTS: dict[str, Callable[[Mapping[str, Any]], tuple[Message, ...] | str]] = {
    "prompt": lambda row: row["prompt"] if isinstance(row["prompt"], str) else parse_messages(row["prompt"], "prompt"),
    "conversations": lambda row: parse_messages(row["conversations"], "conversations"),
    "messages": lambda row: parse_messages(row["messages"], "messages"),
    "instruction": lambda row: _instruction(row),
    "question": lambda row: _asked(row),
}


def _prompt(row: Mapping[str, Any]) -> tuple[Message, ...] | str | None:
    """Return the prompt of a preference row, None where chosen and rejected hold it."""
    keys = [key for key in _PROMPTS if key in row]
    if len(keys) > 1 and row.keys() >= {"prompt", "messages"} and row["messages"] == row["chosen"]:
        keys.remove("messages")
    if len(keys) > 1:
        raise ValueError(f"chosen and rejected with a prompt in each of {', '.join(keys)}")
    return _PROMPTS[keys[0]](row) if keys else None


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split what two texts begin with in common, in whole words, from the rest of them."""
    if chosen == rejected:
        raise ValueError("chosen and rejected are equal, and without a prompt of their own nothing is left of them")
    differing = (index for index, (one, other) in enumerate(zip(chosen, rejected)) if one != other)
    end = next(differing, min(len(chosen), len(rejected)))
    if not (chosen[end : end + 1].isspace() and rejected[end : end + 1].isspace()):
        while end and not chosen[end - 1].isspace():
            end -= 1
    while end and chosen[end - 1].isspace():
        end -= 1
    return chosen[:end], chosen[end:], rejected[end:]


def _split_conversations(
    prompt: str | None, chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """Split off the messages in common; a prompt given as text is a user message, and may repeat one of them."""
    if prompt is not None and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return ({"role": "user", "content": prompt},), chosen, rejected
    length = 0
    while length < min(len(chosen), len(rejected)) and chosen[length] == rejected[length]:
        length += 1
    common = chosen[:length]
    if not common:
        raise ValueError("chosen and rejected have no first message in common, and there is no prompt")
    if prompt is not None and all(message["content"] != prompt for message in common):
        raise ValueError("prompt is none of the messages that chosen and rejected have in common")
    return common, chosen[length:], rejected[length:]


def _answer(value: Any, key: str) -> tuple[Message, ...]:
    """Return messages from a list of them, from one, or from the text of an assistant's."""
    if isinstance(value, str):
        return ({"role": "assistant", "content": value},)
    return (parse_message(value, key),) if isinstance(value, Mapping) else parse_messages(value, key)


def _instruction(row: Mapping[str, Any]) -> tuple[Message, ...]:
    parts = [_string(row, key) for key in ("instruction", "input") if key in row]
    messages: list[Message] = []
    history = row.get("history", ())
    if isinstance(history, str) or not isinstance(history, Sequence):
        raise ValueError(f"history must be a list of pairs of texts, got {type(history).__name__}")
    for index, pair in enumerate(history):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or [type(text) for text in pair] != [str, str]:
            raise ValueError(f"history[{index}] must be a pair of texts, got {pair!r:.80}")
        messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair)]
    messages.append({"role": "user", "content": "\n".join(filter(None, parts))})
    return tuple(messages)


def _asked(row: Mapping[str, Any]) -> tuple[Message, ...]:
    return ({"role": "user", "content": _string(row, "question")},)


def _with_system(row: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    system = _string(row, "system") if "system" in row else ""
    if not system or (messages[0]["role"] == "system" and messages[0]["content"] == system):
        return messages
    if messages[0]["role"] == "system":
        raise ValueError("the row has a system text beside another system message")
    return ({"role": "system", "content": system}, *messages)


def _conversation_tools(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    for key in ("images", "videos", "audios"):
        if row.get(key):
            raise ValueError(f"{key} are not supported, only text")
    return parse_tools(row.get("tools"))


def _check_no_conversation(row: Mapping[str, Any]) -> None:
    if row.get("system"):
        raise ValueError("system needs a conversation, and the prompt is plain text")
    if _conversation_tools(row):
        raise ValueError("tools need a conversation, and the prompt is plain text")


def _begins(messages: tuple[Message, ...], beginning: tuple[Message, ...]) -> bool:
    return len(messages) > len(beginning) and messages[: len(beginning)] == beginning


def _string(row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"{key} must be a string, got {type(row[key]).__name__}")
    return row[key]


def _listed(row: Mapping[str, Any]) -> str:
    keys = [repr(key) for key in row]
    return f"[{', '.join(keys[:12])}{', ...' if len(keys) > 12 else ''}]"


_FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Record]]] = {
    "text": (("text",), _text),
    "messages": (("messages",), lambda row: _chat(row, "messages")),
    "conversations": (("conversations",), lambda row: _chat(row, "conversations")),
    "completion": (("prompt", "completion"), _completion),
    "preference": (("chosen", "rejected"), _preference),
    "alpaca": (("instruction", "output"), _alpaca),
    "question": (("question", "answer"), _question),
}
FORMATS = tuple(_FORMATS)
_TAGS = ("label", "kto_tag")
_LARGEST_MARGIN = 1e30  # far from what float32 ends at
_UNANSWERED = {"question": "answer", "instruction": "output"}
