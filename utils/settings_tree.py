"""What settings files and flags say, as trees whose nodes know which of them says it."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Node:
    value: Any  # dict[str, Node], list[Node] or a scalar
    origin: str  # the file, or the flag with its dashes
    text: str | None = None  # of a scalar as it was written, where that was without quotes
    flag: bool = False  # from the command line: words are read as the field demands, mappings patch lists


_SCALARS: dict[str, Any] = dict.fromkeys(("", "~", "null", "Null", "NULL"))
_SCALARS |= {word: word[0] in "tT" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_WHOLE = r"(0|[1-9][0-9]*(_[0-9]+)*)"
_INT = re.compile(rf"[-+]?{_WHOLE}")
_FLOAT = re.compile(rf"[-+]?(\.[0-9]+|{_WHOLE}(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def _scalar(text: str) -> Any:
    if text in _SCALARS:
        return _SCALARS[text]
    try:
        return int(text) if _INT.fullmatch(text) else float(text) if _FLOAT.fullmatch(text) else text
    except ValueError:  # more digits than Python reads
        return text


class _Loader(yaml.SafeLoader):
    """Tells apart only scalars with quotes and without; types are for `_scalar`."""

    def resolve(self, kind: type, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            return "plain" if implicit[0] else "quoted"
        return super().resolve(kind, value, implicit)


class Dumper(yaml.SafeDumper):
    """Quotes text that either this module or a reader of YAML 1.1 would take for something else."""

    def resolve(self, kind: type, value: Any, implicit: Any) -> str:
        tag = super().resolve(kind, value, implicit)
        if kind is yaml.ScalarNode and implicit[0] and tag == self.DEFAULT_SCALAR_TAG and _scalar(value) != value:
            return "tag:yaml.org,2002:float"
        return tag

    def represent_str(self, data: str) -> yaml.Node:
        # Without double quotes, the line breaks of Unicode would come back as spaces.
        style = '"' if any(mark in data for mark in "\x85\u2028\u2029") else None
        return self.represent_scalar(self.DEFAULT_SCALAR_TAG, data, style)


Dumper.add_representer(str, Dumper.represent_str)


def read_file(path: Path, below: tuple[Path, ...]) -> Node:
    """The tree of a file over those of its bases; `below` is the chain of files that led to it."""
    chain = (*below, path)
    if path.resolve() in [other.resolve() for other in below]:
        raise ValueError(f"{below[-1]}: base: a cycle, {' -> '.join(map(str, chain))}")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        byte, line = error.object[error.start], error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line}: not UTF-8 text (byte 0x{byte:02x})") from None
    except OSError as error:
        if below:
            raise type(error)(error.errno, f"{error.strerror} (the base of {below[-1]})", str(path)) from None
        raise
    own = _parse(text, str(path))
    if own.value is None:
        own = Node({}, own.origin)
    if not isinstance(own.value, dict):
        raise ValueError(f"{path}: expected keys and values, got {show(own)}")
    base = own.value.pop("base", Node([], own.origin))
    tree = Node({}, own.origin)
    for node in base.value if isinstance(base.value, list) else [base]:
        if not isinstance(node.value, str):
            raise ValueError(f"{path}: base: expected the path of a file or a list of paths, got {show(node)}")
        tree = merge(tree, read_file(Path(os.path.normpath(path.parent / node.value)), chain))
    return merge(tree, own)


def _parse(text: str, origin: str, *, flag: bool = False) -> Node:
    try:
        root = yaml.compose(text, Loader=_Loader)
        return Node(None, origin) if root is None else _convert_yaml(root, origin, flag, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"{origin}: line {mark.line + 1}: not valid YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"{origin}: line {line}: the character {chr(error.character)!r} may not stand here") from None
    except RecursionError:
        raise ValueError(f"{origin}: nested too deeply") from None


def _convert_yaml(node: yaml.Node, origin: str, flag: bool, above: tuple[yaml.Node, ...]) -> Node:
    where = f"{origin}: line {node.start_mark.line + 1}:"
    if node in above:
        raise ValueError(f"{where} an alias of what it stands in")
    inner = (origin, flag, (*above, node))
    match node.tag:
        case "plain":
            return Node(_scalar(node.value), origin, node.value, flag)
        case "quoted" | "tag:yaml.org,2002:str":
            return Node(node.value, origin, None, flag)
        case "tag:yaml.org,2002:seq":
            return Node([_convert_yaml(item, *inner) for item in node.value], origin, None, flag)
        case "tag:yaml.org,2002:map":
            return Node(_convert_mapping(node, *inner), origin, None, flag)
    raise ValueError(f"{where} the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} is not allowed")


def _convert_mapping(node: yaml.Node, origin: str, flag: bool, above: tuple[yaml.Node, ...]) -> dict[str, Node]:
    """The values by the text of their keys; those of `<<` stand below the mapping's own."""
    merged: dict[str, Node] = {}
    own: dict[str, Node] = {}
    for key_node, value_node in node.value:
        where = f"{origin}: line {key_node.start_mark.line + 1}:"
        key = key_node.value
        if not isinstance(key, str):
            raise ValueError(f"{where} a key must be a word")
        value = _convert_yaml(value_node, origin, flag, above)
        if key == "<<" and key_node.tag == "plain":
            for part in value.value if isinstance(value.value, list) else [value]:
                if not isinstance(part.value, dict):
                    raise ValueError(f"{where} <<: expected a mapping, got {show(part)}")
                merged = part.value | merged
        elif key in own:
            raise ValueError(f"{where} {key} is given twice")
        else:
            own[key] = value
    return merged | own


def node_of(value: Any, origin: str) -> Node:
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{origin}: a key must be a word, not {wrong[0]!r}")
        return Node({key: node_of(item, origin) for key, item in value.items()}, origin)
    return Node([node_of(item, origin) for item in value] if isinstance(value, list | tuple) else value, origin)


def merge(below: Node, above: Node, key: str = "") -> Node:
    """`above` laid over `below`: mappings merge, flags reach into lists, everything else is replaced."""
    if not isinstance(above.value, dict):
        return above
    if isinstance(below.value, dict):
        merged = dict(below.value)
        for name, node in above.value.items():
            merged[name] = merge(merged[name], node, join(key, name)) if name in merged else node
        # A section keeps the name of the file that begins it; that of a patch is left out.
        return Node(merged, below.origin if above.flag else above.origin, None, below.flag and above.flag)
    if isinstance(below.value, list) and above.flag:
        items = list(below.value)
        for name, node in above.value.items():
            index = list_index(name, len(items), node.origin, key)
            items[index : index + 1] = [merge(items[index], node, join(key, name)) if index < len(items) else node]
        return dataclasses.replace(below, value=items, text=None)
    return above


def list_index(name: str, length: int, origin: str, key: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", name) or int(name) > length:
        raise ValueError(f"{place(origin, key)}: expected the index of an item, 0 to {length}, got {name!r}")
    return int(name)


def flag_pairs(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Keys and texts of a command line; None is the text of a flag without a value."""
    rest, seen = list(argv), set()
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--") or len(arg) == 2:
            raise ValueError(f"unexpected argument {arg!r}: every value needs its --key")
        key, equals, text = arg[2:].partition("=")
        if key in seen:
            raise ValueError(f"--{key} is given twice")
        seen.add(key)
        if not equals:
            text = None if not rest or (rest[0].startswith("--") and len(rest[0]) > 2) else rest.pop(0)
        yield key, text


def flag_tree(key: str, text: str | None) -> Node:
    """One flag as the mapping in mapping that it is laid over the files with."""
    origin = f"--{key}"
    value = True if text is None else text if text in ("", "~") else _scalar(text)
    node = Node(value, origin, text, flag=True)
    if text is not None and text[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):  # it may be meant as text
            node = dataclasses.replace(_parse(text, origin, flag=True), text=text)
    for name in reversed(key.split(".")):
        if not name:
            raise ValueError(f"{origin}: a key is words with dots between them")
        node = Node({name: node}, origin, None, True)
    return node


def join(key: str, name: str) -> str:
    """The dotted key of a name in the section `key`."""
    return f"{key}.{name}" if key else name


def place(origin: str, key: str) -> str:
    """What a message about a key begins with."""
    return origin if origin == f"--{key}" else f"{origin}: {key}"


def short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def show(node: Node) -> str:
    """A value for a message."""
    if isinstance(node.value, dict):
        return short(f"a mapping of {', '.join(node.value) or 'nothing'}")
    if isinstance(node.value, list):
        return f"a list of {len(node.value)}"
    if node.value is None or isinstance(node.value, bool):
        return {None: "null", True: "true", False: "false"}[node.value]
    return short(repr(node.value) if isinstance(node.value, str) or node.text is None else node.text)
