"""The page of `--help` that a dataclass of settings makes."""

import ast
import dataclasses
import inspect
import io
import itertools
import textwrap
import tokenize
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING
from typing import Any

import yaml

from utils.settings_tree import Dumper, join, short
from utils.settings_types import default_of, expected, fields_of, options_of, plain, sections_of


def describe(cls: type) -> str:
    """Text for `--help`: each dotted key with its type, default and, where there is one, its description.

    That is the field's metadata["help"], the string below the field, or the comment behind or above it.
    """
    return "\n".join(_lines(cls, "", None, ()))


def _lines(cls: type, key: str, instance: Any, above: tuple[type, ...]) -> Iterator[str]:
    documents = _documents(cls)
    for name, hint in fields_of(cls).items():
        full, default = join(key, name), default_of(cls, name, instance)
        document = cls.__dataclass_fields__[name].metadata.get("help") or documents.get(name, "")
        sections = sections_of(hint)
        shown = ", required" if default is MISSING else ""
        if default is not MISSING and type(default) not in sections:  # those of a section stand at its keys
            shown = f", default {short(_flow(default))}"
        yield f"--{full}: {expected(hint)}{shown}"
        yield from textwrap.indent(textwrap.fill(document or _first_line(sections), 96), "    ").splitlines()
        inner = {"": sections}
        for option in options_of(hint):
            if typing.get_origin(option) is tuple and typing.get_args(option)[-1] is Ellipsis:
                inner["INDEX"] = sections_of(typing.get_args(option)[0])
            elif typing.get_origin(option) in (dict, Mapping):
                inner["NAME"] = sections_of(typing.get_args(option)[1])
        for part, classes in inner.items():
            for section in classes:
                if section not in (*above, cls):
                    yield from _lines(section, join(full, part) if part else full, default, (*above, cls))


def _flow(value: Any) -> str:
    text = yaml.dump(plain(value, ""), Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _first_line(sections: Sequence[type]) -> str:
    """The first line of a section's docstring, where it has one of its own."""
    for section in sections:
        if section.__doc__ and not section.__doc__.startswith(f"{section.__name__}("):
            return section.__doc__.strip().partition("\n")[0]
    return ""


def _documents(cls: type) -> dict[str, str]:
    """The strings below, or the comments behind or above, the fields of a dataclass and of those it inherits from."""
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(part):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(part))
            body = ast.parse(source).body[0].body
        except (OSError, TypeError, SyntaxError):  # typed at a prompt, say
            continue
        comments = _comments(source)
        for node, behind in itertools.zip_longest(body, body[1:]):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                string = behind.value if isinstance(behind, ast.Expr) else None
                if isinstance(string, ast.Constant) and isinstance(string.value, str):
                    found[node.target.id] = " ".join(inspect.cleandoc(string.value).split())
                elif comment := _comment_of(node, comments):
                    found[node.target.id] = comment
    return found


def _comments(source: str) -> dict[int, tuple[str, bool]]:
    """By line, each comment and whether it has the line to itself."""
    return {
        token.start[0]: (token.string.lstrip("# "), not token.line[: token.start[1]].strip())
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }


def _comment_of(node: ast.AnnAssign, comments: Mapping[int, tuple[str, bool]]) -> str:
    if node.end_lineno in comments:
        return comments[node.end_lineno][0]
    lines: list[str] = []
    line = node.lineno - 1
    while line in comments and comments[line][1]:
        lines.insert(0, comments[line][0])
        line -= 1
    return " ".join(lines)
