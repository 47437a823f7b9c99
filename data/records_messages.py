"""Messages, tool calls and tool lists as people write them, in one form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

# What a turn may be called -> the role that chat templates know.
_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
}
_REASONING = ("reasoning_content", "thinking", "reasoning")
_KEPT = ("name", "tool_call_id")

Message = Mapping[str, Any]


def parse_messages(value: Any, where: str) -> tuple[Message, ...]:
    """Return messages with the keys role and content, and where they have them tool_calls, reasoning_content, name and
    tool_call_id; other keys are dropped.

    Takes role/content and from/value (ShareGPT). A list of text parts becomes their texts joined without anything
    between them. A turn of `function_call`, whose value is JSON of one call or of a list of them, becomes an assistant
    message with tool_calls. Arguments are a mapping, also where they were written as JSON text.
    """
    if not _is_list(value) or not value:
        raise ValueError(f"{where} must be a non-empty list of messages, got {_shown(value)}")
    return tuple(parse_message(item, f"{where}[{index}]") for index, item in enumerate(value))


def parse_message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a message, got {_shown(value)}")
    given = {key: item for key, item in value.items() if item is not None}
    role_key, content_key = ("from", "value") if "from" in given and "role" not in given else ("role", "content")
    role = _ROLES.get(given.get(role_key)) if isinstance(given.get(role_key), str) else None
    if role is None:
        raise ValueError(f"{where} has {role_key} {_shown(given.get(role_key))}, expected one of {sorted(_ROLES)}")
    content = given.get(content_key)
    extra = {key: _text(given[key], f"{where}.{key}") for key in _KEPT if key in given}
    if role == "assistant":
        _check_learnt(given, where)
        extra |= _reasoning(given, where) | _tool_calls(given, where)
        if given[role_key] == "function_call":
            extra["tool_calls"], content = _calls_in_text(content, f"{where}.{content_key}"), ""
        if content is None and extra.keys() & {"tool_calls", "reasoning_content"}:
            content = ""
    elif given.get("tool_calls"):
        raise ValueError(f"{where} has tool_calls, which only an assistant makes, and the role {role}")
    return {"role": role, "content": _content(content, f"{where}.{content_key}")} | extra


def parse_tools(value: Any) -> tuple[Mapping[str, Any], ...] | None:
    """Return tools as `{"type": "function", "function": {"name", ...}}` from a list of them, or of the bare functions,
    or from JSON text of such a list; None for no tools.
    """
    value = _from_json(value, "tools") if isinstance(value, str) and value.strip() else value or None
    if value is None:
        return None
    if not _is_list(value):
        raise ValueError(f"tools must be a list of JSON schemas or JSON text of one, got {_shown(value)}")
    return tuple(_tool(item, f"tools[{index}]") for index, item in enumerate(value)) or None


def _tool(value: Any, where: str) -> Mapping[str, Any]:
    value = _from_json(value, where) if isinstance(value, str) else value
    function = value.get("function") if isinstance(value, Mapping) else None
    if function is None and isinstance(value, Mapping):
        function = {key: item for key, item in value.items() if key not in ("type", "function")}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} must be the JSON schema of a function with a name, got {_shown(value)}")
    return {"type": "function", "function": dict(function)}


def _tool_calls(given: Message, where: str) -> dict[str, Any]:
    calls = given.get("tool_calls")
    if not calls:
        return {}
    if not _is_list(calls):
        raise ValueError(f"{where}.tool_calls must be a list, got {_shown(calls)}")
    return {"tool_calls": [_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]}


def _calls_in_text(text: Any, where: str) -> list[dict[str, Any]]:
    value = _from_json(text, where) if isinstance(text, str) else text
    calls = [value] if isinstance(value, Mapping) else value
    if not _is_list(calls) or not calls:
        raise ValueError(
            f"{where} must be a JSON object with name and arguments, or a list of them, got {_shown(text)}"
        )
    return [_call(call, where) for call in calls]


def _call(value: Any, where: str) -> dict[str, Any]:
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} must be a call with a name and arguments, got {_shown(value)}")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = _from_json(arguments, f"{where}.arguments")
    arguments = {} if arguments in (None, "") else arguments
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}.arguments must be an object or JSON text of one, got {_shown(arguments)}")
    identity = {"id": value["id"]} if value.get("id") is not None else {}
    return identity | {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def _reasoning(given: Message, where: str) -> dict[str, str]:
    key = next((name for name in _REASONING if name in given), None)
    return {} if key is None else {"reasoning_content": _text(given[key], f"{where}.{key}")}


def _check_learnt(given: Message, where: str) -> None:
    for key in ("weight", "train"):
        if key in given and given[key] != 1:
            raise ValueError(f"{where} has {key} {_shown(given[key])}; weights of single messages are not supported")


def _content(value: Any, where: str) -> str:
    if _is_list(value):
        return "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(value))
    return _text(value, where)


def _part(value: Any, where: str) -> str:
    if isinstance(value, Mapping) and value.get("type", "text") == "text" and isinstance(value.get("text"), str):
        return value["text"]
    raise ValueError(f"{where} must be a text part, got {_shown(value)}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a string, got {_shown(value)}")
    return value


def _from_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no valid JSON: {error}") from error


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
