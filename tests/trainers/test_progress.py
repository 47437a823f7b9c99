"""The progress display by a clock that the tests turn: what it says, how often, and that it gives way."""

import io
import re
import sys

import jax.numpy as jnp
import pytest

from trainers.progress import ProgressBar, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Gone(io.StringIO):
    writes = 0

    def write(self, text):
        Gone.writes += 1
        raise OSError(5, "Input/output error")


def make(stream, **options):
    """A display, and a function that lets seconds pass."""
    now = [0.0]
    bar = ProgressBar(1000, stream=stream, clock=lambda: now[0], **options)

    def turn(seconds):
        now[0] += seconds

    return bar, turn


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    bar, turn = make(stream)
    turn(300.0)  # compilation, which the time left does not go by
    bar.advance(1)
    assert stream.getvalue() == "step 1/1000 (0 %)\n"
    values = {"loss": jnp.float32(2.5), "tokens_per_second": 12_345.0, "learning_rate": 3e-4, "other": 1.0}
    bar.write(1, values | {"reward": 0.25})
    for step in range(2, 31):
        turn(2.0)
        bar.advance(step)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2  # steps 1 and 16, thirty seconds later
    assert lines[1] == "step 16/1000 (1 %) · loss 2.5000 · reward 0.250 · 12.3k tokens/s · lr 3.00e-04 · 0:32:48 left"
    bar.close()
    assert stream.getvalue().splitlines()[2].startswith("step 30/1000 (3 %) · loss 2.5")


def test_the_last_line_is_not_said_twice():
    stream = io.StringIO()
    bar, _ = make(stream)
    bar.advance(1)
    bar.close()
    bar.close()
    assert stream.getvalue() == "step 1/1000 (0 %)\n"


def test_a_resumed_run_judges_the_time_by_its_own_steps():
    stream = io.StringIO()
    bar, turn = make(stream, first_step=900)
    bar.advance(901)
    turn(40.0)
    bar.advance(911)
    assert stream.getvalue().splitlines()[1] == "step 911/1000 (91 %) · 0:05:56 left"


def test_nothing_is_said_before_the_first_step():
    stream = io.StringIO()
    bar, _ = make(stream)
    bar.write(0, {"loss": 1.0})
    bar.close()
    assert stream.getvalue() == ""


def test_a_bar_in_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    stream = Terminal()
    out, err = sys.stdout, sys.stderr
    bar, turn = make(stream)
    for step in range(1, 101):
        bar.write(step, {"loss": 3.0, "tokens_per_second": 2e6})
        bar.advance(step)
        turn(0.1)
    drawn = len(re.findall("step ", stream.getvalue()))
    assert 10 <= drawn <= 2 * 10 + 2  # ten seconds, half a second apart
    bar.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert re.search(r"step 100/1000 10 % ━.*loss 3.0000 · 2M tokens/s · 0:01:3\d left\s*$", text)
    assert (sys.stdout, sys.stderr) == (out, err)


@pytest.mark.parametrize(
    ("isatty", "term", "bar"), [(True, "xterm", True), (True, "dumb", False), (False, "xterm", False)]
)
def test_the_style_follows_the_stream(monkeypatch, isatty, term, bar):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = Terminal() if isatty else io.StringIO()
    display, _ = make(stream)
    display.advance(1)
    assert "step 1/1000" in stream.getvalue()
    display.close()
    assert ("\x1b[" in stream.getvalue()) == bar


def test_silence_converts_nothing():
    class Unready:
        def __float__(self):
            raise AssertionError("waited for the device")

    stream = Terminal()
    bar, _ = make(stream, style="silent")
    bar.advance(1)
    bar.write(1, {"loss": Unready()})
    bar.close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("style", ["lines", "bar"])
def test_a_terminal_that_is_gone_does_not_stop_training(style):
    stream = Gone()
    bar, turn = make(stream, style=style)
    Gone.writes = 0
    bar.advance(1)
    assert Gone.writes
    before = Gone.writes
    turn(100.0)
    bar.advance(2)
    bar.write(2, {"loss": 1.0})
    bar.close()
    assert Gone.writes == before


def test_a_closed_stream_does_not_stop_training():
    stream = io.StringIO()
    bar, _ = make(stream)
    stream.close()
    bar.advance(1)
    bar.close()


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match="'loud'"):
        make(io.StringIO(), style="loud")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3_725, "1:02:05"), (200_000, "2 d 7:33:20")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
