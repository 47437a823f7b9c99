"""The program to talk to a model: line by line, and in a terminal."""

import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import chat
from inference import setup
from models.llama import load_tokenizer
from tests.inference.test_text import (
    THINKING,
    chain,
    chat_config,
    following_model,
    write_chat_checkpoint,
    write_chat_tokenizer,
    written,
)
from tests.models.llama.checkpoints import random_model
from utils import cli

GREEDY = ("--temperature=0", "--max_new_tokens=12")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_chat_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of random weights."""
    return write_chat_checkpoint(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="module")
def answering(tmp_path_factory, tokenizer) -> Path:
    """A checkpoint that always answers "Yes, we do!"."""
    ids = written(tokenizer, "\n", "Yes", ", wDo!", tokenizer.special_tokens["<|im_end|>"])
    model = following_model(chain(*ids), tokenizer.vocab_size)
    return write_chat_checkpoint(tmp_path_factory.mktemp("answering"), model=model)


@pytest.fixture
def talk(capsys, monkeypatch) -> Callable[..., tuple[str, str]]:
    """Call the program with some lines on its standard input; returns standard output and standard error."""

    def call(folder: Path | None, lines: str | bytes, *argv: str) -> tuple[str, str]:
        data = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        monkeypatch.setattr(sys, "argv", ["chat.py"])
        place = [] if folder is None else ["--ckpt_dir", str(folder)]
        cli.run(chat.chat, [*place, *argv])
        return tuple(capsys.readouterr())

    return call


def test_each_line_is_answered_on_standard_output(talk, answering):
    assert talk(answering, "what is it\nand now\n") == ("Yes, wDo!\n" * 2, "")
    assert talk(answering, "what is it\r\nno end of line") == ("Yes, wDo!\n" * 2, "")
    assert talk(answering, "ü 🎈\n") == ("Yes, wDo!\n", "")
    assert talk(answering, "") == ("", "")


def test_turns_share_a_conversation_and_its_cache(talk, answering):
    out, err = talk(answering, "what is it\n/stats\nand now\n/stats\n/quit\nnever read\n")
    assert out == "Yes, wDo!\n" * 2
    first, second = (
        list(map(int, re.findall(r"(\d+) tokens prefilled, (\d+) reused", line)[0])) for line in err.splitlines()
    )
    assert first[0] > 0 == first[1]
    assert second[1] > first[0] and 0 < second[0] < second[1]


@pytest.mark.parametrize(
    "words", [["/help", "help", "/HELP", " help "], ["/stats", "stats"], ["/clear", "clear", "Clear"]]
)
def test_commands_with_and_without_their_slash(talk, answering, words):
    answers = {talk(answering, f"hi\n{word}\n", "--max_new_tokens=1") for word in words}
    [(out, err)] = {(out, re.sub(r"[\d.]+", "#", err)) for out, err in answers}
    assert out == "Y\n"
    told = {"help": "Ctrl-C", "stats": "tokens prefilled", "clear": "(new conversation)"}[words[0][1:]]
    assert told in err


@pytest.mark.parametrize("word", ["/quit", "quit", "QUIT", "/exit", "exit", " quit "])
def test_ways_to_leave(talk, answering, word):
    assert talk(answering, f"hi\n{word}\nhi\n") == ("Yes, wDo!\n", "")


@pytest.mark.parametrize("line", ["", "   ", "/clear", "clear"])
def test_an_empty_line_or_clear_begins_a_new_conversation(talk, folder, line):
    flags = ("--temperature=2", "--max_new_tokens=12", "--seed=3")
    anew, _ = talk(folder, f"what is it\n{line}\n/stats\nwhat is it\n", *flags)
    on, _ = talk(folder, "what is it\n/stats\nwhat is it\n", *flags)
    assert anew != on
    out, err = talk(folder, f"what is it\n{line}\nwhat is it\n/stats\n", *GREEDY)
    assert out == out[: len(out) // 2] * 2
    assert err.splitlines()[-1].endswith(" 0 reused from the cache")


def test_unknown_commands_are_not_sent_to_the_model(talk, answering):
    out, err = talk(answering, "/foo\n/clear now\n/\n/stats\n//\n")
    assert out == ""
    assert err.splitlines() == [
        "no such command: /foo; /help lists them",
        "no such command: /clear now; /help lists them",
        "no such command: /; /help lists them",
        "nothing has been asked yet",
        "no such command: //; /help lists them",
    ]


def test_the_limit_of_an_answer_is_told(talk, answering):
    assert talk(answering, "hi\n", "--max_new_tokens=3")[1] == "(the answer reached its limit of tokens)\n"


def test_thinking_is_put_into_the_mouth_of_a_model_whose_template_cannot_ask_for_it(talk, tokenizer, tmp_path):
    ids = written(tokenizer, "\n", "Q", tokenizer.special_tokens["<|im_end|>"])
    folder = write_chat_checkpoint(tmp_path, model=following_model(chain(*ids), tokenizer.vocab_size))
    assert talk(folder, "think: what is it\nThink:what\nwhat\n")[0] == "<think>\nQ\n<think>\nQ\nQ\n"
    assert talk(folder, "think:\nthink:  \n") == ("", "think: goes in front of a question\n" * 2)


def test_thinking_is_asked_of_a_template_that_can(talk, tokenizer, tmp_path):
    newline, open_ = tokenizer.encode("\n")[0], tokenizer.encode("<think>")[0]
    template = THINKING.replace("<think>\n", "<think>")
    ids = written(tokenizer, open_, "T", tokenizer.special_tokens["<|im_end|>"])
    model = following_model(chain(*ids) | {newline: tokenizer.encode("A")[0]}, tokenizer.vocab_size)
    folder = write_chat_checkpoint(tmp_path, model=model, template=template)
    assert talk(folder, "what\nthink: what\n", "--max_new_tokens=2")[0] == "AA\n<think>T\n"


def test_a_full_context_drops_turns_and_says_so(talk, tokenizer, tmp_path):
    model = random_model(chat_config(tokenizer, context=96))
    folder = write_chat_checkpoint(tmp_path, model=model)
    _, err = talk(folder, "what is the colour of it\n" * 6, *GREEDY)
    assert re.search(r"\(the context is full: the oldest (turn was|\d turns were) dropped\)", err)
    _, err = talk(folder, "what\n" * 3 + "rope " * 20 + "\n", *GREEDY)
    assert re.search(r"\(the context is full: the oldest [23] turns were dropped\)", err)


def test_a_question_that_does_not_fit_is_refused_and_the_talk_goes_on(talk, answering):
    out, err = talk(answering, "hi\n" + "#" * 300 + "\nand now\n/stats\n")
    assert out == "Yes, wDo!\n" * 2
    assert "chat.py: " in err and "do not fit the context of 256: say it shorter" in err
    assert not err.splitlines()[-1].endswith(" 0 reused from the cache")


def test_system_template_and_sampling_flags(talk, folder, tmp_path):
    plain, _ = talk(folder, "what is it\n", *GREEDY)
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}")
    for flags in (
        ["--system", "a rope"],
        ["--template", "qa"],
        ["--template", str(tmp_path / "own.jinja")],
        ["--repetition_penalty=5"],
        ["--preset=creative", "--temperature=4"],
        ["--temperature=4", "--top_k=50"],
        ["--temperature=4", "--top_p=0.5"],
        ["--temperature=4", "--min_p=0.3"],
        ["--banned_tokens", json.dumps(list(range(2, 200)))],
        ["--max_new_tokens=2"],
    ):
        given = {flag.split("=")[0] for flag in flags}
        others = [flag for flag in GREEDY if flag.split("=")[0] not in given]
        assert talk(folder, "what is it\n", *others, *flags)[0] != plain, flags
    hot = ("--temperature=4", "--max_new_tokens=12")
    assert talk(folder, "what\n", *hot, "--seed=1") == talk(folder, "what\n", *hot, "--seed=1")
    assert talk(folder, "what\n", *hot, "--seed=1") != talk(folder, "what\n", *hot, "--seed=2")
    for device in ("cpu", "auto"):
        flags = ("--device", device, "--dtype=float32", "--tokenizer_path", str(folder))
        assert talk(folder, "what is it\n", *GREEDY, *flags)[0] == plain


def test_stop_strings_and_newlines(talk, answering, tokenizer, tmp_path):
    assert talk(answering, "hi\n", "--stop", ", w")[0] == "Yes\n"
    assert talk(answering, "hi\nhi\n", "--stop=zz", "--stop=Do")[0] == "Yes, w\n" * 2
    letter, newline = (tokenizer.encode(text)[0] for text in "x\n")
    model = following_model({newline: letter, letter: newline}, tokenizer.vocab_size)
    folder = write_chat_checkpoint(tmp_path, model=model)
    assert talk(folder, "hi\n", "--stop", "\\nx\\n", "--max_new_tokens=9")[0] == "x\n"
    model = following_model({}, tokenizer.vocab_size)
    folder = write_chat_checkpoint(tmp_path / "newlines", model=model)
    flags = ("--temperature=0", "--max_new_tokens=9")
    assert talk(folder, "hi\n", *flags)[0] == "\n" * 10
    assert "\n\n\n" not in talk(folder, "hi\n", *flags, "--max_consecutive_newlines=2")[0].removesuffix("\n")


def test_the_question_answer_format_ends_before_the_next_question(talk, tokenizer, tmp_path):
    colon = tokenizer.encode(":")[0]
    successors = chain(colon, *written(tokenizer, "W", "\nQuestion")) | {tokenizer.encode("n")[0]: colon}
    folder = write_chat_checkpoint(tmp_path, model=following_model(successors, tokenizer.vocab_size))
    flags = ("--template=qa", "--max_new_tokens=60", "--temperature=0", "--stop", "never")
    assert talk(folder, "hi\nhi\n", *flags) == ("W\n" * 2, "")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--promt", "x"], "unknown flag --promt"),
        (["--max_new_tokens=0"], "max_new_tokens must be at least 1, not 0"),
        (["--temperature=-1"], "temperature must be 0 (greedy) or at least 1e-06, not -1.0"),
        (["--top_p=x"], "--top_p must be a number, not 'x'"),
        (["--preset=wild"], "--preset 'wild' is none of"),
        (["--template=/not/there"], "chat template '/not/there' is neither a file nor one of"),
        (["--stop="], "a stop string must not be empty"),
        (["--tokenizer_path=/not/there"], "--tokenizer_path /not/there: no such folder or file"),
        (["hello"], "unexpected argument 'hello'"),
    ],
)
def test_bad_flags_are_one_line(talk, answering, capsys, flags, complaint):
    with pytest.raises(SystemExit) as end:
        talk(answering, "hi\n", *flags)
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert err.startswith(f"chat.py: {complaint}") and err.count("\n") == 1


def test_bad_checkpoints_and_bad_lines_are_one_line(talk, answering, capsys, tmp_path):
    for folder, lines, complaint in (
        (tmp_path / "none", "hi\n", f"--ckpt_dir {tmp_path / 'none'}: no such folder or file"),
        (tmp_path, "hi\n", f"{tmp_path}: no config.json"),
        (answering, b"\xff\xfe\n", "standard input is not UTF-8 text"),
    ):
        with pytest.raises(SystemExit) as end:
            talk(folder, lines)
        out, err = capsys.readouterr()
        assert (end.value.code, out) == (2, "")
        assert err.startswith(f"chat.py: {complaint}") and err.count("\n") == 1


def test_without_a_checkpoint_it_takes_that_of_the_quickstart(talk, answering, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        talk(None, "hi\n")
    assert end.value.code == 2 and "`make quickstart`" in capsys.readouterr().err
    shutil.copytree(answering, tmp_path / setup.QUICKSTART)
    assert talk(None, "hi\n") == ("Yes, wDo!\n", "")


def test_what_a_template_refuses_is_said_and_the_talk_goes_on(talk, tmp_path):
    folder = write_chat_checkpoint(
        tmp_path, template="{% if 'no' in messages[-1].content %}{{ raise_exception('not that') }}{% endif %}a"
    )
    out, err = talk(folder, "no\nwell\n", *GREEDY)
    assert err.splitlines()[0] == "chat.py: not that"
    assert out == talk(folder, "well\n", *GREEDY)[0]


# The screen


def shown(pieces: list[str], *, dim: bool, capsys) -> str:
    screen = chat._Screen(dim=dim)
    for piece in pieces:
        screen.show(piece)
    screen.end()
    return capsys.readouterr().out


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_thoughts_are_dimmed_however_they_arrive(capsys, size):
    answer = "a<b <think>no </thin yes</think>so<think>x"
    pieces = [answer[i : i + size] for i in range(0, len(answer), size)]
    assert shown(pieces, dim=False, capsys=capsys) == answer + "\n"
    colourful = shown(pieces, dim=True, capsys=capsys)
    assert re.sub("\x1b\\[[02]m", "", colourful) == answer + "\n"
    assert dimmed(colourful) == "<think>no </thin yes</think><think>x"


def test_a_thought_that_the_template_opened_is_dimmed(capsys, monkeypatch):
    class Session:
        opened_thought, stats = "<think>\n", types.SimpleNamespace(finish_reason="stop", dropped_turns=0)

        def ask(self, question, **_):
            yield from ("hm", "m</think>", "yes")

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    chat._answer(Session(), "think: what", True)
    output = capsys.readouterr().out
    assert dimmed(output) == "<think>\nhmm</think>" and output.endswith("yes\n")


def dimmed(output: str) -> str:
    return "".join(re.findall("\x1b\\[2m(.*?)\x1b\\[0m", output, flags=re.DOTALL))


# Processes


def test_a_pipe_of_questions(repo_root, answering):
    command = [sys.executable, str(repo_root / "chat.py"), "--ckpt_dir", str(answering)]
    done = subprocess.run(command, input="what\n\nwhat\nquit\n", capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Yes, wDo!\n" * 2, "")


class Terminal:
    """A program in a terminal of its own: what is sent is typed, what is read has been on the screen."""

    def __init__(self, *command: str):
        spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", spawn, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"TERM": "dumb"},
            bufsize=0,
        )
        self.unread = ""

    def type(self, text: str) -> None:
        self.process.stdin.write(text.encode())

    def until(self, wanted: str) -> str:
        """Read until a text has appeared; returns all that is new up to its end. What is behind it is for the next."""
        output, deadline = self.unread, time.monotonic() + 120
        while wanted not in output:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))
            data = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            assert data, f"no {wanted!r} in {output!r}"
            output += data.decode(errors="replace")
        output, found, self.unread = output.partition(wanted)
        return output + found


def test_a_talk_in_a_terminal(repo_root, tokenizer, tmp_path):
    """An answer without an end is stopped by Ctrl-C, and the conversation goes on."""
    open_, close = (tokenizer.encode(text)[0] for text in ("<think>", "</think>"))
    newline, q, r, s = (tokenizer.encode(text)[0] for text in "\nQRS")
    successors = {newline: open_, open_: q, q: close, close: r, r: s, s: r}
    model = following_model(successors, tokenizer.vocab_size, context=60_000)
    folder = write_chat_checkpoint(tmp_path, model=model)
    program = (sys.executable, str(repo_root / "chat.py"), "--ckpt_dir", str(folder))
    terminal = Terminal(*program, "--temperature=0", "--max_new_tokens=50000")
    try:
        assert "/help lists the commands" in terminal.until("> ")
        terminal.type("what is it\r")
        answer = terminal.until("RSRSRS")
        assert dimmed(answer) == "<think>Q</think>"
        terminal.type("\x03")
        assert "Traceback" not in terminal.until("(stopped)")
        terminal.until("> ")
        terminal.type("/stats\r")
        assert " 0 reused from the cache" in terminal.until("> ")
        terminal.type("and now\r")
        terminal.until("RSRSRS")
        terminal.type("\x03")
        terminal.until("> ")
        terminal.type("/stats\r")
        stats = terminal.until("> ")
        prefilled, reused = map(int, re.findall(r"(\d+) tokens prefilled, (\d+) reused", stats)[0])
        assert reused > prefilled
        terminal.type("\r")
        assert "(new conversation)" in terminal.until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
