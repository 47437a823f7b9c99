"""Completions as one reads them: a table on standard error now and then, all of them in completions.jsonl."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainers.groups import Group
from trainers.in_flight import InFlight
from trainers.logs import cut_lines
from trainers.trainer import TrainState

COMPLETIONS_FILE = "completions.jsonl"
_SHOWN_CHARACTERS = 400


class CompletionsLog:
    """Every so many steps the completions of a rollout: `shown` of them in a table, all in the file.

    They are written at the first of the steps that learn from them, where one of those is due. A line of the file has
    step, prompt, completion, its number of tokens, whether it came to an end, its rewards by name and together (null
    where they do not apply). A resumed run's file is cut at the step that it goes on from.
    """

    def __init__(
        self,
        folder: Path,
        experience: InFlight,
        names: Sequence[str],
        *,
        every_steps: int,
        shown: int,
        table: bool,
        resume_step: int | None,
        stream: TextIO | None = None,
    ):
        self._experience, self._names = experience, tuple(names)
        self._every_steps, self._shown, self._table = every_steps, shown, table
        self._stream = stream
        self._path = folder / COMPLETIONS_FILE
        cut_lines(self._path, -1 if resume_step is None else resume_step)

    def __call__(self, step: int, state: TrainState, metrics: Mapping[str, jax.Array]) -> None:
        groups = self._experience.groups
        last = step + self._experience.num_waiting
        if not groups or last // self._every_steps == (step - 1) // self._every_steps:
            return
        rows = [row for group in groups for row in self._rows(step, group)]
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        if self._table and self._shown:
            self._print(step, rows)

    def _rows(self, step: int, group: Group) -> list[dict]:
        prompt = group.prompt.prompt if isinstance(group.prompt.prompt, str) else list(group.prompt.prompt)
        return [
            {
                "step": step,
                "prompt": prompt,
                "completion": text,
                "tokens": int(count),
                "ended": bool(stopped),
                "rewards": {name: _number(value) for name, value in zip(self._names, rewards_F)},
                "reward": _number(total),
            }
            for text, count, stopped, rewards_F, total in zip(
                group.texts, group.count_C, group.stopped_C, group.rewards_CF, group.total_C
            )
        ]

    def _print(self, step: int, rows: list[dict]) -> None:
        """Those at even distances, so that they are of several prompts."""
        chosen = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, self._shown).astype(int))]
        table = Table(title=f"completions of step {step}", show_lines=True)
        for name in ("prompt", "completion"):
            table.add_column(name, overflow="fold", ratio=1)
        for name in ("reward",) if len(self._names) == 1 else (*self._names, "reward"):
            table.add_column(name, justify="right")
        for row in chosen:
            texts = [row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"] or ""]
            texts.append(row["completion"])
            values = [row["reward"]] if len(self._names) == 1 else [*row["rewards"].values(), row["reward"]]
            shown = ["-" if value is None else f"{value:.3g}" for value in values]
            table.add_row(*(Text(_shortened(text)) for text in texts), *shown)
        Console(file=self._stream or sys.stderr).print(table)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
