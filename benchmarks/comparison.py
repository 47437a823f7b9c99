"""Sides of a comparison as processes of their own, which take turns, and the table of what they took.

The other end of the lines that a side reads and answers is `benchmarks.turns`.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.turns import Order
from utils.host import huge_pages_environment

ROOT = Path(__file__).resolve().parents[1]
_EXCEPTION = re.compile(r"[\w.]+(Error|Exception|Interrupt)\b")  # the line of a traceback that names it
_BEGAN = time.monotonic()


def check_known(name: str, value: str, known: tuple[str, ...]) -> str:
    """The value; raises ValueError where it is none of those."""
    if value not in known:
        raise ValueError(f"{name} {value!r} is none of {', '.join(known)}")
    return value


def items_of(text: str | tuple) -> list[str]:
    """Items of a comma-separated flag, which python-fire may have parsed already."""
    items = text if isinstance(text, tuple | list) else text.split(",")
    return [str(item) for item in items if item]


def note(text: str) -> None:
    print(f"[{time.monotonic() - _BEGAN:6.1f} s] {text}", file=sys.stderr, flush=True)


def alone(function: Callable, *arguments: Any) -> Any:
    """What it returns in a process of its own, so that this one, which only waits, holds nothing."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def settings_of(setting: str) -> tuple[str, ...]:
    """Words joined by +; none in "plain"."""
    return tuple(setting.split("+")) if setting != "plain" else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One of those that are compared: its order, and the module, interpreter and platform of jax that serve it."""

    order: Order
    module: str
    python: str
    platform: str

    @property
    def name(self) -> str:
        """What its row is called."""
        return " ".join(["ropewalk" if self.order.kind == "ours" else self.order.kind, *self.order.settings])

    @property
    def environment(self) -> dict[str, str]:
        pages = huge_pages_environment() if "pages" in self.order.settings else {}
        return {"JAX_PLATFORMS": self.platform, "HF_HUB_OFFLINE": "1"} | pages


class Process:
    """A side at work, until it is closed. Raises RuntimeError with its last words where it ends before."""

    def __init__(self, side: Side, checks: Sequence[dict] = ()):
        self._name = side.name
        note(f"{side.name}: starts")
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [side.python, "-m", side.module],
            cwd=ROOT,
            env={**os.environ, **side.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
        )
        self._say(json.dumps(dataclasses.asdict(dataclasses.replace(side.order, checks=tuple(checks)))))

    def step(self) -> dict[str, Any]:
        """The figures of its next step."""
        self._say("")
        return self._answer()

    def checks(self) -> list[dict[str, float]]:
        """What it makes of the batches that it was started with."""
        return self._answer()["checks"]

    def _answer(self) -> dict[str, Any]:
        answer = self._process.stdout.readline()
        while answer and "note" in (figures := json.loads(answer)):
            note(f"{self._name}: {figures['note']}")
            answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._complaints.seek(0)
            lines = [line for line in self._complaints.read().splitlines() if line.strip()] or ["it ended"]
            raise RuntimeError(next((line for line in reversed(lines) if _EXCEPTION.match(line)), lines[-1]))
        return figures

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._complaints.close()

    def _say(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # then it has ended, as the next answer tells
            print(line, file=self._process.stdin, flush=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """How a benchmark starts sides, takes their steps and sums them up.

    Attributes:
        checks: Of the peers' first steps, what ours is started with.
        first_step: Of a side and its process, with the first steps of those before it, by name: what that side's first
            step answers. Raises ValueError where sides have not done the same, RuntimeError where the process ends.
        step: The same of a later one.
        sum_up: The figures of a row, from the steps that count.
    """

    checks: Callable[[dict[str, dict]], list[dict]]
    first_step: Callable[[Side, Process, dict[str, dict]], dict[str, Any]]
    step: Callable[[Side, Process], dict[str, Any]]
    sum_up: Callable[[list[dict]], dict[str, Any]]


def measure_in_turns(sides: list[Side], rounds: int, warm_up: int, rules: Rules) -> dict[str, dict[str, Any]]:
    """By name: the first step's seconds and what the rules sum up; or the error of a peer that fails.

    Ours come last: they are compared with what the others have done.
    """
    figures: dict[str, dict[str, Any]] = {}
    firsts: dict[str, dict] = {}
    with contextlib.ExitStack() as stack:
        running = []
        for side in sides:
            ours = side.order.kind == "ours"
            process = Process(side, rules.checks(firsts) if ours else ())
            stack.callback(process.close)
            try:
                step = rules.first_step(side, process, firsts)
            except RuntimeError as error:  # such as too little memory, or no compiler
                if ours:
                    raise
                figures[side.name] = {"error": str(error)}
                continue
            if not ours:
                firsts[side.name] = step
            figures[side.name] = {"first": step["seconds"]}
            running.append((side, process))
        steps: dict[str, list[dict]] = {side.name: [] for side, _ in running}
        for _ in range(warm_up - 1 + rounds):
            for side, process in running:
                steps[side.name].append(rules.step(side, process))
    for name, taken in steps.items():
        figures[name] |= rules.sum_up(taken[-rounds:])
    return figures


def check_same(figure: str, ours: float, name: str, theirs: float, tolerance: float) -> None:
    """Raise ValueError where a peer's figure is not ours, relative to ours."""
    if not abs(ours - theirs) <= tolerance * abs(ours):
        raise ValueError(f"{figure} of ropewalk and {name} differ: {ours} and {theirs}")


class Table:
    """Markdown with a row for each side; the last column is ours, the fastest so far, as a fraction of it.

    `columns` are those between the seconds of a step and the peak memory, `cells` makes them of a side's figures.
    """

    def __init__(self, columns: Sequence[str], cells: Callable[[dict[str, Any]], list[str]]):
        self._cells_between = cells
        self._seconds: dict[str, dict[str, float]] = {}  # by kind and name
        header = ["side", "first step s", "step s", *columns, "peak GiB", "ropewalk takes"]
        self._width = len(header) - 1
        print("| " + " | ".join(header) + " |\n|---|" + "---:|" * self._width, flush=True)

    def add(self, figures: dict[str, dict[str, Any]]) -> None:
        """Rows of the sides of these names."""
        for name, side in figures.items():
            if "seconds" in side:
                self._seconds.setdefault(name.split()[0], {})[name] = side["seconds"]
        for name, side in figures.items():
            print("| " + " | ".join([name, *self._cells(name, side)]) + " |", flush=True)

    def _cells(self, name: str, side: dict[str, Any]) -> list[str]:
        if "error" in side:
            print(f"{name}: {side['error']}", file=sys.stderr, flush=True)
            reached = f"{side['first']:.1f}, then failed" if "first" in side else "failed"
            return [reached] + [""] * (self._width - 1)
        cells = [f"{side['first']:.1f}", f"{side['seconds']:.3f}", *self._cells_between(side)]
        cells.append("" if side["peak"] is None else f"{side['peak'] / 2**30:.2f}")
        kind = name.split()[0]
        ours, own = self._seconds.get("ropewalk"), self._seconds[kind]
        if kind == "ropewalk" or not ours:
            return [*cells, ""]
        fastest = " (its fastest)" if side["seconds"] == min(own.values()) else ""
        return [*cells, f"{min(ours.values()) / side['seconds']:.2f}x{fastest}"]
