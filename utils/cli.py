"""Commands through python-fire in which a mistake is one line on standard error and exit code 2."""

import contextlib
import difflib
import inspect
import io
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any


class UsageError(ValueError):
    """What a user asked for cannot be done as asked; the message says what to do."""


def run(command: Callable[..., None], argv: Sequence[str] | None = None) -> None:
    """Call `command` with the flags of the command line, and exit.

    Its parameters must be keyword-only and annotated: str, int, float, bool, tuple[str, ...], or one of these | None. A
    tuple flag may be repeated, or given once as a JSON list. `--help` prints the docstring through python-fire.
    ValueError and OSError from the command become one line and exit code 2, an interrupt exit code 130. With the
    environment variable ROPEWALK_DEBUG set, tracebacks are shown.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = os.path.basename(sys.argv[0])
    try:
        if any(arg in ("--help", "-h", "help") for arg in argv):
            _print_help(command, name)
        else:
            command(**_values(command, argv))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(_say(name, "interrupted", 130))
    except (ValueError, OSError) as error:
        if os.environ.get("ROPEWALK_DEBUG"):
            raise
        sys.exit(_say(name, _one_line(error), 2))


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
    print(page.getvalue().replace("INFO: Showing help with the command '", "").split("\n\n", 1)[-1].rstrip())


def _values(command: Callable[..., None], argv: list[str]) -> dict[str, Any]:
    """The parameters that the flags give, converted as annotated."""
    import fire

    parameters = inspect.signature(command).parameters
    argv, repeated = _take_repeated(argv, parameters)
    _check_flags(argv, parameters)
    caught: dict[str, str] = {}

    def keep(**flags: str) -> None:
        caught.update(flags)

    keep.__signature__ = inspect.Signature(
        [p.replace(default=None, annotation=inspect.Parameter.empty) for p in parameters.values()]
    )
    keep = fire.decorators.SetParseFn(str)(keep)
    problems = io.StringIO()
    try:
        with contextlib.redirect_stderr(problems), contextlib.redirect_stdout(io.StringIO()):
            fire.Fire(keep, command=argv)
    except SystemExit:
        lines = [line for line in problems.getvalue().splitlines() if line.startswith("ERROR")]
        raise UsageError(lines[0].removeprefix("ERROR: ") if lines else "the flags make no sense; see --help") from None
    given = {key: value for key, value in caught.items() if value is not None} | repeated
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in given]
    if missing:
        raise UsageError(f"--{missing[0]} is required; see --help")
    return {key: _convert(key, value, parameters[key].annotation) for key, value in given.items()}


def _flag_name(arg: str) -> str:
    return arg[2:].split("=", 1)[0].replace("-", "_")


def _take_repeated(argv: list[str], parameters: typing.Mapping) -> tuple[list[str], dict[str, list[str]]]:
    """Take out the flags that may be repeated, since python-fire keeps the last of them alone."""
    rest, repeated = [], {}
    position = 0
    while position < len(argv):
        arg = argv[position]
        name = _flag_name(arg) if arg.startswith("--") else ""
        if name in parameters and _kind(parameters[name].annotation)[0] is tuple:
            if "=" in arg:
                value = arg.split("=", 1)[1]
            else:
                position += 1
                if position == len(argv):
                    raise UsageError(f"--{name} needs a value")
                value = argv[position]
            repeated.setdefault(name, []).append(value)
        else:
            rest.append(arg)
        position += 1
    return rest, repeated


def _check_flags(argv: list[str], parameters: typing.Mapping) -> None:
    """Refuse what python-fire would answer with a page: unknown flags and bare words; a lone flag must be a switch."""
    position = 0
    while position < len(argv):
        arg = argv[position]
        position += 1
        if not arg.startswith("--") or arg == "--":
            raise UsageError(f"unexpected argument {arg!r}: every value needs its flag; see --help")
        name = _flag_name(arg)
        is_switch = name in parameters and _kind(parameters[name].annotation)[0] is bool
        if name.startswith("no") and _kind(getattr(parameters.get(name[2:]), "annotation", None))[0] is bool:
            continue
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1)
            raise UsageError(f"unknown flag --{name}" + (f": did you mean --{near[0]}?" if near else "; see --help"))
        if "=" in arg:
            continue
        has_value = position < len(argv) and not _is_flag(argv[position], parameters)
        if has_value and (not is_switch or argv[position].lower() in _BOOLEANS):
            position += 1
        elif not is_switch:
            raise UsageError(f"--{name} needs a value")


def _is_flag(arg: str, parameters: typing.Mapping) -> bool:
    return arg.startswith("--") and len(arg) > 2


_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def _kind(annotation: Any) -> tuple[type | None, bool]:
    """The plain type behind an annotation, and whether None is allowed too."""
    if isinstance(annotation, types.UnionType):
        options = [option for option in typing.get_args(annotation) if option is not type(None)]
        return _kind(options[0])[0], True
    return typing.get_origin(annotation) or annotation, False


def _convert(name: str, value: str | list[str], annotation: Any) -> Any:
    kind, optional = _kind(annotation)
    if kind is tuple:
        return tuple(item for text in value for item in _items(text))
    if optional and value in ("None", "none"):
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
