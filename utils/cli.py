"""Commands through python-fire in which a mistake is one line on standard error and exit code 2."""

import contextlib
import difflib
import inspect
import io
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


class UsageError(ValueError):
    """What a user asked for cannot be done as asked; the message says what to do."""


def run(command: Callable[..., None], argv: Sequence[str] | None = None) -> None:
    """Call `command` with the flags of the command line, and exit.

    Its parameters must be keyword-only and annotated: str, int, float, bool, tuple[str, ...], or one of these | None. A
    tuple flag may be repeated, or given once as a JSON list; a switch is --flag, --no-flag or --flag=false; a value
    that begins with two dashes goes behind a =. `--help` prints the docstring through python-fire.
    ValueError and OSError from the command become one line and exit code 2, as does a lack of memory, an interrupt exit
    code 130. With the environment variable ROPEWALK_DEBUG set, tracebacks are shown.
    """
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # closed by whoever started the program
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115
    argv = list(sys.argv[1:] if argv is None else argv)
    name = os.path.basename(sys.argv[0])
    with one_line_errors(name, lack_of_memory="lower --batch_size, --n or --max_new_tokens"):
        flags = None if argv == ["help"] else _flags(argv, inspect.signature(command).parameters)
        if flags is None:
            _print_help(command, name)
        else:
            command(**_values(command, flags))


@contextlib.contextmanager
def one_line_errors(name: str, *, lack_of_memory: str = "make the batch smaller") -> Iterator[None]:
    """Turn the errors that `run` lists into one line of the program `name` and its exit codes.

    `lack_of_memory` is the advice where there is too little.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(_say(name, "interrupted", 130))
    except (ValueError, OSError, OverflowError) as error:
        if os.environ.get("ROPEWALK_DEBUG"):
            raise
        sys.exit(_say(name, _one_line(error), 2))
    except (MemoryError, RuntimeError) as error:
        if os.environ.get("ROPEWALK_DEBUG") or not _is_lack_of_memory(error):
            raise
        sys.exit(_say(name, f"not enough memory: {lack_of_memory}", 2))


def _is_lack_of_memory(error: Exception) -> bool:
    """Whether Python or jax, whose own error is a RuntimeError, found no memory."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)


def _say(name: str, message: str, code: int) -> int:
    print(f"{name}: {message}", file=sys.stderr)
    return code


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _print_help(command: Callable[..., None], name: str) -> None:
    import fire

    page = io.StringIO()
    with contextlib.redirect_stderr(page), contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        fire.Fire(command, command=["--help"], name=name)
    text = page.getvalue().split("\n\n", 1)[-1].rstrip()  # without the line on how to ask for this page
    text = re.sub(r"^    -\w, (?=--)", "    ", text, flags=re.MULTILINE)  # flags have no short form here
    print(re.sub(r"Type: Optional\[(\w+) \| None\]", r"Type: \1", text))


def _values(command: Callable[..., None], flags: Mapping[str, list[str]]) -> dict[str, Any]:
    """The parameters that the flags give, read by python-fire and converted as annotated."""
    import fire

    parameters = inspect.signature(command).parameters
    # python-fire keeps the last of repeated flags alone, so those are held back.
    given: dict[str, Any] = {key: texts for key, texts in flags.items() if _kind(parameters[key])[0] is tuple}

    def keep(**values: str) -> None:
        given.update((key, value) for key, value in values.items() if value is not None)

    keep.__signature__ = inspect.Signature(
        [p.replace(default=None, annotation=inspect.Parameter.empty) for p in parameters.values()]
    )
    single = [f"--{key}={texts[-1]}" for key, texts in flags.items() if key not in given]
    fire.Fire(fire.decorators.SetParseFn(str)(keep), command=single)
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in given]
    if missing:
        raise UsageError(f"--{missing[0]} is required; see --help")
    return {key: _convert(key, value, parameters[key]) for key, value in given.items()}


def _flags(argv: Sequence[str], parameters: Mapping[str, inspect.Parameter]) -> dict[str, list[str]] | None:
    """The texts given for each flag, or None where help is asked for. Raises UsageError for what is no known flag.

    python-fire alone would answer a mistake with a page, and read words such as - and -- as commands of its own.
    """
    flags: dict[str, list[str]] = {}
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        if arg in ("--help", "-h"):
            return None
        if not _is_flag(arg):
            raise UsageError(f"unexpected argument {arg!r}: every value needs its --flag; see --help")
        name, equals, value = arg[2:].partition("=")
        name = name.replace("-", "_")
        switch_off = name.removeprefix("no").removeprefix("_")
        if name not in parameters and not equals and name[:2] == "no" and _is_switch(parameters.get(switch_off)):
            name, equals, value = switch_off, "=", "False"
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1)
            raise UsageError(f"unknown flag --{name}" + (f": did you mean --{near[0]}?" if near else "; see --help"))
        if not equals:
            value = _value_behind(name, rest, is_switch=_is_switch(parameters[name]))
        if name in flags and _kind(parameters[name])[0] is not tuple:
            raise UsageError(f"--{name} is given twice")
        flags.setdefault(name, []).append(value)
    return flags


def _value_behind(name: str, rest: list[str], *, is_switch: bool) -> str:
    """Take the value of a flag from the arguments behind it; a switch may do without."""
    if is_switch:
        return rest.pop(0) if rest and rest[0].lower() in _BOOLEANS else "True"
    if not rest:
        raise UsageError(f"--{name} needs a value")
    if _is_flag(rest[0]):
        raise UsageError(f"--{name} needs a value; one that begins with two dashes goes as --{name}={rest[0]}")
    return rest.pop(0)


def _is_flag(arg: str) -> bool:
    return arg.startswith("--") and len(arg) > 2


_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def _kind(parameter: inspect.Parameter) -> tuple[type, bool]:
    """The plain type of a parameter, and whether it may be None too."""
    annotation, optional = parameter.annotation, False
    if isinstance(annotation, types.UnionType):
        annotation = next(option for option in typing.get_args(annotation) if option is not type(None))
        optional = True
    return typing.get_origin(annotation) or annotation, optional


def _is_switch(parameter: inspect.Parameter | None) -> bool:
    return parameter is not None and _kind(parameter)[0] is bool


def _convert(name: str, value: str | list[str], parameter: inspect.Parameter) -> Any:
    kind, optional = _kind(parameter)
    if kind is tuple:
        return tuple(item for text in value for item in _items(text))
    if optional and kind is not str and value in ("None", "none"):
        return None
    try:
        if kind is bool:
            return _BOOLEANS[value.lower()]
        return kind(value)
    except (ValueError, KeyError):
        words = {int: "a whole number", float: "a number", bool: "true or false"}
        raise UsageError(f"--{name} must be {words[kind]}, not {value!r}") from None


def _items(text: str) -> list[str]:
    """A JSON list of strings, or the text itself."""
    with contextlib.suppress(json.JSONDecodeError):
        parsed = json.loads(text)
        if isinstance(parsed, list):
            return [str(item) for item in parsed]
    return [text]
