"""How far training is, on standard error: a bar in a terminal, a plain line now and then elsewhere."""

import math
import os
import sys
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, Protocol, TextIO

STYLES = ("auto", "bar", "lines", "silent")

# Metrics that are shown, where they are written, and how.
_SHOWN: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:.4f}",
    "reward": lambda value: f"reward {value:.3f}",
    "tokens_per_second": lambda value: f"{_short(value)} tokens/s",
    "learning_rate": lambda value: f"lr {value:.2e}",
}


class _Display(Protocol):
    interval: float  # seconds between two drawings

    def draw(self, step: int, total: int, tail: str) -> None: ...

    def close(self) -> None: ...


class ProgressBar:
    """Shows steps, time left, loss, reward if there is one, tokens per second, learning rate. A `MetricWriter` too.

    Call `advance` after every step: it looks at the clock, and draws no more than twice a second, as a line no more
    than twice a minute. `write` keeps those of these metrics that it is given, to show them from then on; it converts
    them with float(), which waits for values of jax. The time left goes by the steps behind the first, which compiles.
    A terminal that goes away ends the display and not the training.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        style: str = "auto",
        stream: TextIO | None = None,
        clock: Callable[[], float] = perf_counter,
    ):
        """`first_step` counts the steps that a resumed run has behind it. `stream` is standard error by default."""
        if style not in STYLES:
            raise ValueError(f"progress style {style!r} is none of {', '.join(STYLES)}")
        stream = sys.stderr if stream is None else stream
        if style == "auto":
            style = "bar" if stream.isatty() and os.environ.get("TERM") != "dumb" else "lines"
        self._total, self._step, self._clock = total_steps, first_step, clock
        self._values: dict[str, float] = {}
        self._first: tuple[int, float] | None = None  # the first step of this run, and when it was done
        self._drawn: int | None = None
        self._due = -math.inf
        self._display = {"bar": _Bar, "lines": _Lines, "silent": lambda _: None}[style](stream)

    def advance(self, step: int) -> None:
        """`step` steps are done, of all that are to be done."""
        self._step = step
        if self._display is None:
            return
        now = self._clock()
        if self._first is None:
            self._first = step, now
        if now >= self._due:
            self._draw(now)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show these values from the next drawing on."""
        if self._display is not None:
            self._values |= {name: float(metrics[name]) for name in _SHOWN if name in metrics}

    def close(self) -> None:
        """Show where training stands, and leave it standing there."""
        if self._display is None:
            return
        if self._first is not None and (self._drawn != self._step or self._display.interval < 1):
            self._draw(self._clock())
        self._end()

    def _draw(self, now: float) -> None:
        parts = [show(self._values[name]) for name, show in _SHOWN.items() if name in self._values]
        left = self._seconds_left(now)
        parts += [] if left is None else [f"{duration(left)} left"]
        try:
            self._display.draw(self._step, self._total, " · ".join(parts))
            self._due, self._drawn = now + self._display.interval, self._step
        except (OSError, ValueError):  # ValueError: the stream has been closed
            self._end()

    def _end(self) -> None:
        display, self._display = self._display, None
        try:
            if display is not None:
                display.close()
        except (OSError, ValueError):
            pass

    def _seconds_left(self, now: float) -> float | None:
        first_step, first_time = self._first
        if self._step <= first_step:
            return None
        return max(0, self._total - self._step) * (now - first_time) / (self._step - first_step)


class _Lines:
    interval = 30.0

    def __init__(self, stream: TextIO):
        self._stream = stream

    def draw(self, step: int, total: int, tail: str) -> None:
        print(" · ".join(filter(None, (f"step {step}/{total} ({_percent(step, total)})", tail))), file=self._stream)
        self._stream.flush()

    def close(self) -> None:
        pass


class _Bar:
    interval = 0.5

    def __init__(self, stream: TextIO):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        def text(field: str) -> Any:
            return TextColumn("{task.fields[" + field + "]}", markup=False, table_column=Column(no_wrap=True))

        self._progress = Progress(
            text("head"),
            BarColumn(bar_width=20),
            text("tail"),
            console=Console(file=stream, force_terminal=True),
            auto_refresh=False,  # no thread beside the training
            redirect_stdout=sys.stdout.isatty(),  # else what is piped elsewhere would end in the terminal
        )
        self._task = self._progress.add_task("", head="", tail="")

    def draw(self, step: int, total: int, tail: str) -> None:
        self._progress.start()
        head = f"step {step}/{total} {_percent(step, total)}"
        self._progress.update(self._task, completed=step, total=total, head=head, tail=tail, refresh=True)

    def close(self) -> None:
        self._progress.stop()


def _percent(step: int, total: int) -> str:
    return f"{math.floor(100 * step / total)} %" if total else "100 %"


def _short(number: float) -> str:
    """Three digits or so and a unit: 950, 12.3k, 1.25M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, with the days in front where it takes days."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days} d ' if days else ''}{hour}:{minute:02}:{second:02}"
