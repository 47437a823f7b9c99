"""Command lines to calls: what each way of writing a flag means, and what a mistake looks like."""

import io
import os
import sys

import pytest

from utils import cli
from utils.cli import UsageError


def command(
    *,
    folder: str,
    prompt: str | None = None,
    count: int = 3,
    rate: float | None = None,
    limit: int | None = None,
    fast: bool = False,
    nice_words: tuple[str, ...] = (),
) -> None:
    """Do a thing.

    At some length.

    Args:
        folder: Where it is.
        prompt: What to say.
        count: How many.
        rate: How fast.
        limit: How far.
        fast: Whether to hurry.
        nice_words: Some words.
    """
    seen.update(locals())


seen: dict = {}


@pytest.fixture(autouse=True)
def _program(monkeypatch):
    seen.clear()
    monkeypatch.setattr(sys, "argv", ["/somewhere/program.py"])
    monkeypatch.delenv("ROPEWALK_DEBUG", raising=False)


def values(*argv: str) -> dict:
    """What the command is called with, apart from the required folder."""
    cli.run(command, ["--folder", "f", *argv])
    assert seen.pop("folder") == "f"
    return {k: v for k, v in seen.items() if v != command.__kwdefaults__[k]}


def mistake(capsys, *argv: str, call=command) -> str:
    """The one line that a mistake is answered with."""
    with pytest.raises(SystemExit) as end:
        cli.run(call, argv)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("program.py: ") and err.count("\n") == 1 and err.endswith("\n")
    assert not seen
    return err.removeprefix("program.py: ").rstrip()


def test_defaults_are_those_of_the_function():
    assert values() == {}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--count", "5"], {"count": 5}),
        (["--count=5"], {"count": 5}),
        (["--count", "-5"], {"count": -5}),
        (["--rate", "1"], {"rate": 1.0}),
        (["--rate=1e-3"], {"rate": 0.001}),
        (["--rate=-.5"], {"rate": -0.5}),
        (["--limit", "9"], {"limit": 9}),
        (["--limit=None"], {}),
        (["--rate", "none"], {}),
        (["--fast"], {"fast": True}),
        (["--fast", "--count", "1"], {"fast": True, "count": 1}),
        (["--fast=True"], {"fast": True}),
        (["--fast", "true"], {"fast": True}),
        (["--fast=1"], {"fast": True}),
        (["--fast=False"], {}),
        (["--fast", "no"], {}),
        (["--nofast"], {}),
        (["--no-fast"], {}),
        (["--no_fast"], {}),
        (["--nice-words", "a"], {"nice_words": ("a",)}),
    ],
)
def test_ways_to_write_a_flag(argv, expected):
    assert values(*argv) == expected


@pytest.mark.parametrize(
    "text",
    [
        *(
            "007",
            "1e5",
            "True",
            "None",
            "none",
            "[1, 2]",
            "{'a': 1}",
            '{"a": 1}',
            "'quoted'",
            '"q"',
            "a=b",
            "=",
            "help",
        ),
        *(
            "-",
            "--",
            "-x",
            "-1",
            "a b",
            " ",
            "a\nb",
            "naïve 🎈 日本",
            "\\n",
            "#no",
            "a,b",
            "(1,)",
            "b'x'",
            "1_0",
            "x--y",
        ),
    ],
)
def test_text_stays_the_text_it_is(text):
    assert values("--prompt", text) == {"prompt": text}
    assert values(f"--prompt={text}") == {"prompt": text}
    if not text.startswith("["):
        assert values("--nice_words", text) == values(f"--nice_words={text}") == {"nice_words": (text,)}


@pytest.mark.parametrize("text", ["--x", "---", "--count", "--count=3", "--help", ""])
def test_text_that_looks_like_a_flag_goes_behind_an_equals_sign(text):
    assert values(f"--prompt={text}") == {"prompt": text}
    assert values(f"--nice_words={text}") == {"nice_words": (text,)}


def test_repeated_words_and_json_lists_add_up():
    assert values("--nice_words", "a", "--nice-words=b c") == {"nice_words": ("a", "b c")}
    assert values("--nice_words", '["a", "", "ü"]', "--nice_words", "x") == {"nice_words": ("a", "", "ü", "x")}
    assert values("--nice_words", "[1, 2]") == {"nice_words": ("1", "2")}
    assert values("--nice_words", "[not json") == {"nice_words": ("[not json",)}
    assert values("--nice_words", '{"a": 1}') == {"nice_words": ('{"a": 1}',)}
    assert values("--nice_words", "[]") == {}


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "--folder is required; see --help"),
        (["--folder"], "--folder needs a value"),
        (["--folder", "f", "--count"], "--count needs a value"),
        (["--folder", "--fast"], "--folder needs a value; one that begins with two dashes goes as --folder=--fast"),
        (["--folder", "f", "--nice_words", "--fast"], "--nice_words needs a value; one that begins with two dashes"),
        (["--folder", "f", "--cout", "3"], "unknown flag --cout: did you mean --count?"),
        (["--folder", "f", "--nice-word=x"], "unknown flag --nice_word: did you mean --nice_words?"),
        (["--folder", "f", "--zzz"], "unknown flag --zzz; see --help"),
        (["--folder", "f", "--nocount"], "unknown flag --nocount"),
        (["--folder", "f", "--no-fast=True"], "unknown flag --no_fast"),
        (["--folder", "f", "3"], "unexpected argument '3': every value needs its --flag"),
        (["--folder", "f", "-c", "3"], "unexpected argument '-c'"),
        (["--folder", "f", "--"], "unexpected argument '--'"),
        (["--folder", "f", "--fast", "x"], "unexpected argument 'x'"),
        (["--folder", "f", "--count", "x"], "--count must be a whole number, not 'x'"),
        (["--folder", "f", "--count", "1.5"], "--count must be a whole number, not '1.5'"),
        (["--folder", "f", "--count="], "--count must be a whole number, not ''"),
        (["--folder", "f", "--count=None"], "--count must be a whole number, not 'None'"),
        (["--folder", "f", "--limit", "many"], "--limit must be a whole number, not 'many'"),
        (["--folder", "f", "--rate", "x"], "--rate must be a number, not 'x'"),
        (["--folder", "f", "--fast=maybe"], "--fast must be true or false, not 'maybe'"),
        (["--folder", "f", "--count", "1", "--count=2"], "--count is given twice"),
        (["--folder", "f", "--folder", "g"], "--folder is given twice"),
        (["help", "me"], "unexpected argument 'help'"),
    ],
)
def test_mistakes_are_one_line(capsys, argv, complaint):
    assert mistake(capsys, *argv).startswith(complaint)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UsageError("try\n  again"), "try again"),
        (ValueError(), "ValueError"),
        (FileNotFoundError(2, "No such file", "x/y"), "x/y: No such file"),
        (OSError("odd"), "odd"),
        (OverflowError("too big"), "too big"),
    ],
)
def test_errors_of_the_command_are_one_line(capsys, monkeypatch, error, line):
    def fail(*, a: int = 1) -> None:
        raise error

    assert mistake(capsys, call=fail) == line
    monkeypatch.setenv("ROPEWALK_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.run(fail, [])


def test_a_defect_is_not_dressed_up_as_a_mistake():
    def fail(*, a: int = 1) -> None:
        raise KeyError("a defect")

    with pytest.raises(KeyError):
        cli.run(fail, [])


def test_an_interrupt_is_one_line_and_130(capsys):
    def fail(*, a: int = 1) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        cli.run(fail, [])
    assert end.value.code == 130
    assert capsys.readouterr().err == "program.py: interrupted\n"


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"], ["--folder", "f", "-h"], ["--count", "x", "--help"]])
def test_help_names_and_describes_every_flag(capsys, argv):
    cli.run(command, argv)
    out, err = capsys.readouterr()
    assert err == "" and not seen
    assert "program.py - Do a thing." in out and "At some length." in out
    for name, description in (
        ("folder", "Where it is."),
        ("prompt", "What to say."),
        ("count", "How many."),
        ("rate", "How fast."),
        ("limit", "How far."),
        ("fast", "Whether to hurry."),
        ("nice_words", "Some words."),
    ):
        assert f"    --{name}=" in out and description in out
    assert "Default: 3" in out and "Optional[" not in out
    assert "-c, --count" not in out  # there are no short forms, whatever python-fire says


def test_a_reader_that_has_gone_is_no_error(capsys, monkeypatch):
    """As `program | head -1`: writing fails, now or when the text is flushed at the end."""
    readable, writable = os.pipe()
    os.close(readable)

    def speak(*, a: int = 1) -> None:
        print("hello")

    with io.TextIOWrapper(os.fdopen(writable, "wb", buffering=0), line_buffering=False) as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        cli.run(speak, [])
        cli.run(speak, ["--help"])
    assert capsys.readouterr().err == ""


def test_a_closed_stream_is_an_empty_one(monkeypatch):
    def read() -> None:
        seen["input"] = sys.stdin.read()
        print("into the void")

    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", None)
    cli.run(read, [])
    assert seen["input"] == ""


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")])
def test_a_lack_of_memory_is_one_line(capsys, error):
    def ask_for_too_much() -> None:
        raise error

    assert "not enough memory" in mistake(capsys, call=ask_for_too_much)


def test_other_failures_keep_their_traceback():
    def fail() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(fail, [])
