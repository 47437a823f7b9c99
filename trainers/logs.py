"""Where the numbers of a training run go: lines of JSON, TensorBoard, Weights & Biases.

A writer converts values with float(), which waits for a value of jax that is still being computed; nothing else here
waits for a device. So write every so many steps, not at each.
"""

import contextlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

METRICS_FILE = "metrics.jsonl"
_WANDB_MODES = ("online", "offline", "disabled")


class MetricWriter(Protocol):
    """Takes the metrics of steps in the order of the steps; several writes may have the same step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep these values as those of `step`."""

    def close(self) -> None:
        """Bring everything to its place. The last call."""


class SilentWriter:
    """Writes nothing: for processes other than the first."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class JsonlWriter:
    """A line `{"step": 3, "loss": 2.5}` for each write, out of this process when `write` returns.

    The lines are strict JSON, which has no infinity and no not-a-number: both are null.
    Raises OSError with the path where it cannot write.
    """

    def __init__(self, path: str | Path, *, resume_step: int | None = None):
        """A new file; or, with `resume_step`, the one that is there without what comes behind that step.

        So the file of a resumed run reads like that of a run that was never interrupted. A half-written last line goes
        too. -1 keeps nothing. Raises FileExistsError for a file with content without `resume_step`, and ValueError
        where a line in it is none of ours, before anything is changed.
        """
        self._path = Path(path)
        with _writable(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step is not None:
                cut_lines(self._path, resume_step)
            elif self._path.is_file() and self._path.stat().st_size:
                raise FileExistsError(
                    f"{self._path} holds the metrics of another run: resume it or take another folder"
                )
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if "step" in metrics:
            raise ValueError(f"a metric cannot be called step: {dict(metrics)}")
        values = {name: float(value) for name, value in metrics.items()}
        row = {"step": int(step)} | {name: v if math.isfinite(v) else None for name, v in values.items()}
        with _writable(self._path):
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        with _writable(self._path):
            self._file.close()


def cut_lines(path: Path, last_step: int) -> None:
    """Take the lines of later steps out of a file of JSON lines, if there is one, in one move.

    Raises ValueError for a line without a step.
    """
    if not path.exists():
        return
    # What stands behind the last newline was cut short while it was being written.
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    kept = [line for number, line in enumerate(lines, 1) if _step_of(line, f"{path}:{number}") <= last_step]
    beside = path.with_name(path.name + ".new")
    beside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(beside, path)


def _step_of(line: str, where: str) -> int:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        step = json.loads(line)["step"]
        if isinstance(step, int):
            return step
    raise ValueError(f"{where}: no line of metrics: {line.strip()!r:.80}")


class TensorBoardWriter:
    """Event files for TensorBoard, at most ten seconds behind.

    On resuming, what was written behind `resume_step` stays in the older file, marked so that TensorBoard hides it.
    Raises ValueError where tensorboardX is not installed, OSError where the folder cannot be written.
    """

    def __init__(self, folder: str | Path, *, resume_step: int | None = None):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ValueError('TensorBoard logs need tensorboardX: pip install "ropewalk[tensorboard]"') from None
        purge_step = None if resume_step is None else resume_step + 1
        self._folder = Path(folder)
        with _writable(self._folder):
            # TensorBoard reads files in the order of their names, which tensorboardX makes of whole seconds.
            suffix = f".{time.time_ns()}"
            self._events = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10, filename_suffix=suffix)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        with _writable(self._folder):
            for name, value in metrics.items():
                self._events.add_scalar(name, float(value), step)

    def close(self) -> None:
        with _writable(self._folder):
            self._events.close()


@dataclass(frozen=True, kw_only=True)
class WandbOptions:
    """Where a run goes in Weights & Biases. `mode` None leaves it to WANDB_MODE, which is online if it is not set."""

    project: str
    name: str | None = None
    entity: str | None = None
    mode: str | None = None

    def __post_init__(self) -> None:
        if not self.project:
            raise ValueError("project must not be empty")
        if self.mode is not None and self.mode not in _WANDB_MODES:
            raise ValueError(f"mode {self.mode!r} is none of {', '.join(_WANDB_MODES)}")


class WandbWriter:
    """A run of Weights & Biases, whose id is kept in `folder`/wandb-run-id.txt, so that resuming goes on with it.

    Weights & Biases keeps the first value for a step: what a resumed run writes again up to the step that the run had
    reached is dropped there, with a warning. In exactly resumed training it is the same values.
    Raises ValueError where wandb is not installed or refuses, OSError where the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        options: WandbOptions,
        *,
        resume_step: int | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        """`config` is what the run is listed with: its settings."""
        try:
            import wandb
        except ImportError:
            raise ValueError('Weights & Biases logs need wandb: pip install "ropewalk[wandb]"') from None
        self._folder = Path(folder)
        with _writable(self._folder):
            run_id = _run_id(self._folder, resume=resume_step is not None)
        try:
            self._run = wandb.init(
                project=options.project,
                name=options.name,
                entity=options.entity,
                mode=options.mode,
                id=run_id,
                resume="allow",
                dir=str(self._folder),
                config=dict(config or {}),
                settings=wandb.Settings(console="off"),  # else it takes standard error from the progress bar
            )
        except wandb.errors.Error as error:
            raise ValueError(f"Weights & Biases: {error}") from None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({name: float(value) for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def _run_id(folder: Path, *, resume: bool) -> str:
    """The id in the folder where a run is resumed and there is one; else a new one, which is put there.

    Writing it also finds out whether the folder can be written, where wandb would quietly take another.
    """
    path = folder / "wandb-run-id.txt"
    folder.mkdir(parents=True, exist_ok=True)
    run_id = path.read_text(encoding="utf-8").strip() if resume and path.exists() else ""
    run_id = run_id or secrets.token_hex(4)
    path.write_text(run_id + "\n", encoding="utf-8")
    return run_id


class MultiWriter:
    """Passes everything on to several writers, with the values converted once."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self._writers = tuple(writers)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        for writer in self._writers:
            writer.write(int(step), values)

    def close(self) -> None:
        """Close all of them, and raise what the last of those raised that could not be closed."""
        with contextlib.ExitStack() as stack:
            for writer in reversed(self._writers):
                stack.callback(writer.close)


def open_writers(
    folder: str | Path,
    *,
    process_index: int = 0,
    resume_step: int | None = None,
    tensorboard: bool = False,
    wandb: WandbOptions | None = None,
    config: Mapping[str, Any] | None = None,
) -> MetricWriter:
    """Lines of JSON in `folder`/metrics.jsonl, and what else is asked for; in other processes than the first, nothing.

    `resume_step` is the step of the checkpoint that training goes on from, None for a new run, -1 for one that begins
    again in its own folder. `config` goes to Weights & Biases. Raises OSError and ValueError as the writers do; then
    none is left open.
    """
    if process_index:
        return SilentWriter()
    folder = Path(folder)
    with contextlib.ExitStack() as opened:

        def keep(writer: MetricWriter) -> MetricWriter:
            opened.callback(writer.close)
            return writer

        writers = [keep(JsonlWriter(folder / METRICS_FILE, resume_step=resume_step))]
        if tensorboard:
            writers.append(keep(TensorBoardWriter(folder / "tensorboard", resume_step=resume_step)))
        if wandb is not None:
            writers.append(keep(WandbWriter(folder, wandb, resume_step=resume_step, config=config)))
        opened.pop_all()
    return MultiWriter(writers)


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Name the path in the errors of what cannot be written; a full disk, say, does not."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # one of ours, in words
            raise
        raise type(error)(f"cannot write {path}: {error.strerror}") from None
