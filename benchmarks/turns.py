"""A side of a comparison at work: what it is told, when its steps may begin, what it answers.

A side is a program that reads lines from standard input and answers on standard output, in JSON: the first line is an
`Order`, every further one asks for a step, which it answers with its figures. Without what is heavy, for any
environment; the other end of the lines is `benchmarks.comparison`.
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """Who is to do what: a kind of side, its settings, and, for ours, what peers did of which it is to do the same.

    `work` is a dataclass of the benchmark, whose `rows` micro-batches share out.
    """

    kind: str
    settings: tuple[str, ...]
    work: Any
    checks: tuple[dict, ...] = ()

    def micro(self) -> int:
        """Rows in a micro-batch of the training part."""
        sizes = [int(word.removeprefix("micro")) for word in self.settings if word.startswith("micro")]
        return sizes[-1] if sizes else self.work.rows


def check_settings(kind: str, settings: tuple[str, ...], known: Mapping[str, str]) -> None:
    """Raise ValueError for a word that is not a setting of this side; `known` has a pattern of its words for each."""
    for word in settings:
        if not re.fullmatch(known[kind], word):
            raise ValueError(f"{word!r} is no setting of {kind}: {known[kind].replace('|', ', ')}")


class Turns:
    """When the side's next step may begin, and what it says about it afterwards.

    The clock of a step runs from `wait`; `timed` adds what happens within it to one of its parts.
    """

    def __init__(self, replies: Any):
        self._replies, self._started, self._parts = replies, 0.0, {}
        self.count = 0

    def wait(self) -> None:
        """Until a step is asked for; ends the process where none will be."""
        if not sys.stdin.readline():
            end()
        self._parts, self._started = {}, time.perf_counter()

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._parts[part] = self.part(part) + seconds
        self.note(f"{part} took {seconds:.2f} s")

    def elapsed(self) -> float:
        """Seconds of this step so far."""
        return time.perf_counter() - self._started

    def part(self, name: str) -> float:
        """Seconds of this step in that part so far."""
        return self._parts.get(name, 0.0)

    def note(self, text: str) -> None:
        """Tell how far the side has come, between its answers."""
        self.answer({"note": text})

    def answer(self, what: dict[str, Any]) -> None:
        print(json.dumps(what), file=self._replies, flush=True)

    def done(self, **figures: Any) -> None:
        """Answer with the step's figures."""
        self.answer(figures)
        self.count += 1


def serve(sides: Mapping[str, Callable[[Order, Turns], None]], work: Callable[..., Any]) -> None:
    """Take an order, and turns until standard input ends; what libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    raw = json.loads(sys.stdin.readline())
    order = Order(**raw | {"work": work(**raw["work"]), "settings": tuple(raw["settings"])})
    sides[order.kind](order, Turns(replies))


def end() -> NoReturn:
    """Leave at once: the trainers of the peers are in the middle of a run, some of it in other threads."""
    sys.stderr.flush()
    os._exit(0)


def peak_resident_bytes() -> int | None:
    """Linux's record of this process; None elsewhere."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
    return None
