"""Which annotations the dataclasses of settings may have, and how they are called."""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from utils.settings_tree import short


@functools.cache
def fields_of(cls: type) -> Mapping[str, Any]:
    """Annotations of a dataclass's fields, by name; TypeError where settings cannot have one of them."""
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise TypeError(f"{cls!r} is no dataclass")
    hints = typing.get_type_hints(cls)
    found = {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}
    for name, hint in found.items():
        _check(hint, f"{cls.__name__}.{name}")
    return types.MappingProxyType(found)


def _check(hint: Any, key: str) -> None:
    for kind, option in kinds_of(hint, key).items():
        if kind in (tuple, dict):
            for argument in typing.get_args(option):
                if argument is not Ellipsis:
                    _check(argument, key)


def default_of(cls: type, name: str, instance: Any) -> Any:
    """What a field is without a value: that of the section's own default, else of its class; MISSING if required."""
    if type(instance) is cls:
        return getattr(instance, name)
    f = cls.__dataclass_fields__[name]
    return f.default if f.default_factory is MISSING else f.default_factory()


def options_of(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def sections_of(hint: Any) -> list[type]:
    return [option for option in options_of(hint) if dataclasses.is_dataclass(option)]


def kinds_of(hint: Any, key: str = "") -> dict[Any, Any]:
    """The options of an annotation by what they are read as; TypeError for one that cannot be."""
    kinds: dict[Any, Any] = {}
    for option in options_of(hint):
        kind = typing.get_origin(option) or option
        kind = dataclass if dataclasses.is_dataclass(kind) else dict if kind is Mapping else kind
        arguments = typing.get_args(option)
        fits = kind in (dataclass, Literal, bool, int, float, str, Path, types.NoneType)
        fits |= kind is tuple and bool(arguments)
        fits |= kind is dict and arguments[:1] == (str,)
        rival = {dataclass: dict, dict: dataclass, str: Path, Path: str}.get(kind)
        if not fits or kind in kinds or rival in kinds:
            raise TypeError(f"{key}: settings cannot be annotated {hint}")
        kinds[kind] = option
    return kinds


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def expected(hint: Any) -> str:
    """In words, what may be written for an annotation."""
    kinds = kinds_of(hint)
    words = []
    for kind, option in kinds.items():
        arguments = typing.get_args(option)
        if kind is Literal:
            words += [repr(value) if isinstance(value, str) else str(value).lower() for value in arguments]
        elif kind is tuple and arguments[-1] is Ellipsis:
            words.append(f"a list (each {expected(arguments[0])})")
        elif kind is tuple:
            words.append(f"a list of {len(arguments)} ({', '.join(map(expected, arguments))})")
        elif kind is dict:
            words.append(f"a mapping (each value {expected(arguments[1])})")
        elif kind is dataclass:
            words.append("a section")
        elif kind is not types.NoneType:
            words.append(_WORDS[kind])
    return " or ".join(words + ["null"] * (types.NoneType in kinds))


def dotted_keys(cls: type, above: tuple[type, ...]) -> Iterator[str]:
    """The keys of a section, those of the sections in it after its own."""
    yield from fields_of(cls)
    for name, hint in fields_of(cls).items():
        for section in sections_of(hint):
            if section not in (*above, cls):
                yield from (f"{name}.{inner}" for inner in dotted_keys(section, (*above, cls)))


def plain(value: Any, key: str) -> Any:
    """A value of settings as JSON can hold it; TypeError, with its key, for what is none."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: plain(getattr(value, name), f"{key}.{name}") for name in fields_of(type(value))}
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item, f"{key}.{i}") for i, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    raise TypeError(f"{key}: {short(repr(value))} is not a value of settings")
