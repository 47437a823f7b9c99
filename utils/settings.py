"""Settings of a run: YAML files and command-line flags, read strictly into nested frozen dataclasses, and written back.

A file may name another, or a list of others, under `base` (relative to itself): it is laid over them, the later of a
list over the earlier. Sections and other mappings merge key by key; lists, like everything else, are replaced. Flags
(`--trainer.learning_rate=1e-5`, `--data.train.0.path=x`, `--lora.rank=8`) are laid over the files; an index one past
the end of a list appends. What is left out of a section comes from its place's default where that is a section too.

Scalars are those of YAML 1.2, whose numbers are as Python writes them (1e-5, 1_000) and in which nothing but true and
false is a boolean: `no` is text, unless the field is a bool. A dataclass may be annotated with int, float, bool, str,
Path, Literal, tuple[X, ...], tuple[X, Y], dict[str, X], other dataclasses, and unions of these in which the kind of a
value (scalar, list, mapping) and its type tell which is meant; anything else is a TypeError. Numbers are finite.
"""

import contextlib
import difflib
import itertools
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from utils.settings_help import describe as describe
from utils.settings_tree import (
    Dumper,
    Node,
    flag_pairs,
    flag_tree,
    join,
    list_index,
    merge,
    node_of,
    place,
    read_file,
    show,
)
from utils.settings_types import default_of, dotted_keys, expected, fields_of, kinds_of, plain

T = TypeVar("T")


def load_settings(
    cls: type[T], path: str | os.PathLike[str] | None, overrides: Sequence[str] | Mapping[str, str] = ()
) -> T:
    """The settings of a file and the files it is based on, under flags; without a file, those of the flags alone.

    `overrides` are arguments of a command line, `--key=value` or `--key value`, or values by dotted key. A value is
    read as its field demands: a str field takes the text as it is, `null` is None where the field may be None (and so
    is `none`, where it may not be text), a switch needs no value, lists and sections are YAML in brackets.

    Raises ValueError, in one line that begins with the file or flag that set the value, for what is no key, not of its
    field's type, missing, given twice, refused by a dataclass, or no YAML; OSError for a file that cannot be read.
    """
    if "base" in fields_of(cls):
        raise TypeError(f"{cls.__name__}.base: a settings file names its parents by this key")
    tree = Node({}, "command line") if path is None else read_file(Path(path), ())
    pairs = overrides.items() if isinstance(overrides, Mapping) else flag_pairs(overrides)
    for key, text in pairs:
        tree = merge(tree, flag_tree(key, text))
    return _section(cls, tree, "", None)


def to_dict(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass as mappings, lists and scalars that JSON can hold; TypeError for other values."""
    return plain(settings, type(settings).__name__)


def from_dict(cls: type[T], values: Mapping[str, Any], *, source: str = "settings") -> T:
    """The inverse of `to_dict`; `source` is what errors, as of `load_settings`, name instead of a file."""
    node = node_of(values, source)
    if not isinstance(node.value, dict):
        raise ValueError(f"{source}: expected keys and values, got {show(node)}")
    return _section(cls, node, "", None)


def dump_yaml(settings: Any) -> str:
    """The YAML text that `load_settings` reads back to equal settings."""
    return yaml.dump(to_dict(settings), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def diff(a: Any, b: Any) -> list[str]:
    """Dotted keys at which two settings, or what `to_dict` made of them, differ; 1 and 1.0 do.

    Where a section or a list stands against something else, or against a list of another length, it is the key of it.
    """
    a, b = (dict(x) if isinstance(x, Mapping) else to_dict(x) for x in (a, b))
    return list(_differences(a, b, ""))


def _section(cls: type[T], node: Node, key: str, instance: Any) -> T:
    """A dataclass of the values of a mapping; `instance` is what it is without them, None for the class's defaults."""
    hints, given = fields_of(cls), node.value
    for name in given:
        if name not in hints:
            raise ValueError(f"{place(given[name].origin, join(key, name))}: unknown; {_hint(cls, name, key, given)}")
    values = {}
    for name, hint in hints.items():
        default = default_of(cls, name, instance)
        if name in given:
            values[name] = _value(hint, given[name], join(key, name), default)
        elif default is MISSING:
            raise ValueError(f"{place(node.origin, join(key, name))}: required, but not given")
        else:
            values[name] = default
    try:
        return cls(**values)
    except ValueError as error:
        origins = dict.fromkeys(child.origin for child in given.values()) or {node.origin: None}
        raise ValueError(": ".join([", ".join(origins), *([key] if key else []), str(error)])) from error


def _hint(cls: type, name: str, key: str, given: Mapping[str, Node]) -> str:
    """What may have been meant by an unknown key of a section."""
    dashes = "--" if given[name].flag else ""
    known = list(fields_of(cls))
    near = difflib.get_close_matches(name, known, n=1)
    deeper = [other for other in dotted_keys(cls, ()) if name in (other, other.rpartition(".")[2])]
    if "." in name and deeper:
        return "a key with dots is for the command line, in a file its parts stand one under the other"
    if near or deeper:
        return f"did you mean {dashes}{join(key, (deeper + near)[0])}?"
    return f"known keys: {', '.join(known)}"


def _value(hint: Any, node: Node, key: str, default: Any) -> Any:
    """The value of a node for a field; `default`, that of the field, is what a section or a patch completes."""
    kinds = kinds_of(hint)
    if node.text is None and node.value is True and node.flag and bool not in kinds:
        raise ValueError(f"{node.origin}: needs a value: {expected(hint)}")
    if node.value is None and types.NoneType in kinds:
        return None
    if isinstance(node.value, dict) and dataclass in kinds:
        return _section(kinds[dataclass], node, key, default)
    if isinstance(node.value, dict) and dict in kinds:
        start = dict(default) if node.flag and isinstance(default, Mapping) else {}
        hint = typing.get_args(kinds[dict])[1]
        return start | {name: _value(hint, item, join(key, name), start.get(name)) for name, item in node.value.items()}
    if isinstance(node.value, list) and tuple in kinds:
        return _tuple(kinds[tuple], node, key, dict(enumerate(node.value)), ())
    if isinstance(node.value, dict) and node.flag and tuple in kinds:
        items: dict[int, Node] = {}
        defaults = default if isinstance(default, tuple) else ()
        for name, item in node.value.items():
            items[list_index(name, max(len(defaults), len(items)), item.origin, key)] = item
        return _tuple(kinds[tuple], node, key, items, defaults)
    for accept in _ACCEPT:
        value = accept(kinds, node)
        if value is not MISSING:
            return value
    raise ValueError(f"{place(node.origin, key)}: expected {expected(hint)}, got {show(node)}{_advice(kinds, node)}")


def _tuple(hint: Any, node: Node, key: str, items: Mapping[int, Node], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """`defaults` with the items that are given in their places."""
    length = max(len(defaults), *(index + 1 for index in items), 0)
    hints = typing.get_args(hint)
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = hints[:1] * length
    if length != len(hints):
        raise ValueError(f"{place(node.origin, key)}: expected {expected(hint)}, got a list of {length}")
    old = (*defaults, *itertools.repeat(None, length - len(defaults)))
    return tuple(_value(hints[i], items[i], join(key, str(i)), old[i]) if i in items else old[i] for i in range(length))


_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}


def _accept_literal(kinds: Mapping[Any, Any], node: Node) -> Any:
    given = [node.value, node.text] if node.flag else [node.value]
    for option in typing.get_args(kinds.get(Literal, None)):
        if any(type(value) is type(option) and value == option for value in given):
            return option
    return MISSING


def _accept_bool(kinds: Mapping[Any, Any], node: Node) -> Any:
    if bool not in kinds:
        return MISSING
    if isinstance(node.value, bool):
        return node.value
    words = _SWITCHES | ({"1": True, "0": False} if node.flag and not kinds.keys() & {int, float} else {})
    return words.get((node.text or "").lower(), MISSING)


def _accept_number(kinds: Mapping[Any, Any], node: Node) -> Any:
    if int in kinds and type(node.value) is int:
        return node.value
    if float in kinds and type(node.value) in (int, float):
        with contextlib.suppress(OverflowError):
            return float(node.value) if math.isfinite(node.value) else MISSING
    return MISSING


def _accept_text(kinds: Mapping[Any, Any], node: Node) -> Any:
    text = node.text if node.flag and node.text is not None else node.value
    for kind in (str, Path):
        if kind in kinds and isinstance(text, str):
            return kind(text)
    return MISSING


def _accept_none(kinds: Mapping[Any, Any], node: Node) -> Any:
    return None if node.flag and types.NoneType in kinds and node.text in ("none", "None") else MISSING


_ACCEPT = (_accept_literal, _accept_bool, _accept_number, _accept_text, _accept_none)


def _advice(kinds: Mapping[Any, Any], node: Node) -> str:
    """What to write instead, where that is plain."""
    if int in kinds and isinstance(node.value, float) and node.value.is_integer() and abs(node.value) < 1e15:
        return f"; write {int(node.value)}"
    if kinds.keys() & {str, Path} and not node.flag and node.text and node.value is not None:
        return f'; write "{node.text}"'
    if tuple in kinds and node.flag and node.text and node.text[0] != "[":
        return f"; write [{node.text}]"
    return ""


def _differences(a: Any, b: Any, key: str) -> Iterator[str]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in dict.fromkeys((*a, *b)):
            yield from _differences(a.get(name, MISSING), b.get(name, MISSING), join(key, name))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (one, other) in enumerate(zip(a, b)):
            yield from _differences(one, other, join(key, str(i)))
    elif type(a) is not type(b) or a != b:
        yield key
