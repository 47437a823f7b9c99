"""Run the Jinja chat templates of Hugging Face checkpoints, which are other people's code, in a sandbox."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import jinja2

OPENING = "generation_opening"
CLOSING = "generation_closing"


class _RefusedError(Exception):
    """What a template raises through raise_exception."""


def run_template(template: str, context: Mapping[str, Any]) -> str:
    """Return what a template makes of its variables.

    The variables named OPENING and CLOSING are written where a `{% generation %}` block begins and ends.
    Raises ValueError for a template that does not compile or fails, and with its own words where it refuses.
    """
    try:
        compiled = _compiled(template)
    except Exception as error:
        line = getattr(error, "lineno", None)
        raise ValueError(f"chat template does not compile{f', line {line}' if line else ''}: {error}") from error
    try:
        return compiled.render(context)
    except _RefusedError as refusal:
        raise ValueError(str(refusal)) from refusal
    except Exception as error:
        raise ValueError(f"chat template failed with {type(error).__name__}: {error}") from error


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@functools.cache
def _environment() -> jinja2.Environment:
    """Return the environment that chat templates are written for: transformers' helpers and white-space rules."""
    from jinja2 import nodes, sandbox, utils
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension

    class Generation(Extension):
        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            opening, closing = (nodes.Output([nodes.Name(name, "load")]) for name in (OPENING, CLOSING))
            return nodes.Scope([opening, *body, closing]).set_lineno(line)

    class Namespace(utils.Namespace):
        """A namespace that keeps templates from dressing it up as another kind of object."""

        def __init__(*args: Any, **attributes: Any) -> None:
            self, *rest = args
            utils.Namespace.__init__(self)
            for name, value in dict(*rest, **attributes).items():
                self[name] = value

        def __setitem__(self, name: Any, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace cannot have an attribute {name!r}")
            super().__setitem__(name, value)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "namespace": Namespace,
        "dict": lambda *args, **values: dict(*args, **values),
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment


def _raise_exception(message: str) -> None:
    raise _RefusedError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON without Jinja's escapes for HTML and, unless asked for, for characters beyond ASCII."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
