"""A step of GRPO beside TRL and tunix: seconds, and what they go to.

    python -m benchmarks.grpo --peer trl
    python -m benchmarks.grpo --peer trl,tunix --tunix_python .venv.tunix/bin/python
    python -m benchmarks.grpo --peer trl --device gpu --dtype bfloat16 --shape llama-3.2-1b --prompts 16 \\
        --completions 16 --prompt_tokens 256 --new_tokens 1024

A step rolls out completions of some prompts, all of the same number of tokens, scores them with a function that knows
nothing, and makes one update by AdamW: every side from the same random weights on the same prompts, with no KL term and
so no reference. The norm of every peer's first gradient, and its entropy where it tells it, must be what ours has on
that peer's own completions and advantages, or the program fails. `transformers` generates for TRL, without vLLM.

Every side is a process of its own. On a CPU all are kept waiting and take turns, a step each, so that a machine whose
speed drifts slows all, and nothing is timed before the check. An accelerator has no room for two: there they come one
after the other, ours first, each with its row as soon as it is done, and the check of a peer behind its row. What is
being run, and how long each step took, goes to standard error.

Settings of a side are words joined by +, and a peer is timed once for each setting in its list:

    pages          its buffers in huge pages, as the training program has them; of a CPU alone
    microN         N completions in a micro-batch; by default all are in one
    shared         ours: each prompt is run once for its completions, the default on CPUs
    repeated       ours: in front of each of them, the default on GPUs
    checkpointing  TRL: activations are computed again in the backward pass
    compiled       TRL: torch.compile
    continuous     TRL: transformers generates with continuous batching
    halves         TRL: weights and optimizer state in bfloat16, which ours and its other settings have in float32
    plain          none of them
"""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import fire

from benchmarks.grpo_work import TUNIX_ROPE_THETA, Order, Work, check_settings
from utils.host import huge_pages_environment

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_SETTINGS = {
    "cpu": {"ours": "pages", "trl": "plain,pages,micro8,checkpointing", "tunix": "plain,pages"},
    "gpu": {"ours": "micro32", "trl": "micro16,micro16+halves,micro64+checkpointing", "tunix": "plain"},
}
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}  # relative, of norms of gradients and of entropies
_EXCEPTION = re.compile(r"[\w.]+(Error|Exception|Interrupt)\b")  # the line of a traceback that names it
PARTS = ("seconds", "rollout", "score", "train")


def main(
    peer: str = "",
    shape: str = "small",
    prompts: int = 4,
    completions: int = 8,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    dtype: str = "float32",
    device: str = "cpu",
    rounds: int = 7,
    warm_up: int = 2,
    ours: str | None = None,
    trl: str | None = None,
    tunix: str | None = None,
    tunix_python: str = sys.executable,
) -> None:
    """Print a Markdown table with a row for each side.

    Args:
        peer: trl, tunix, or both.
        shape: Name of a preset.
        prompts: In a step.
        completions: Of each prompt.
        prompt_tokens: In each prompt.
        new_tokens: In each completion.
        dtype: Of the computation; parameters and optimizer state are float32.
        device: cpu or gpu.
        rounds: Timed steps of each side; its figures are their medians.
        warm_up: Steps before, of which the first compiles.
        ours: Setting of ours.
        trl: Settings of TRL, by default those that may be its fastest.
        tunix: Settings of tunix.
        tunix_python: Interpreter of an environment that has tunix.
    """
    _check("device", device, tuple(DEFAULT_SETTINGS))
    _check("dtype", dtype, tuple(TOLERANCES))
    peers = [_check("peer", name, ("trl", "tunix")) for name in _list(peer)]
    if "tunix" in peers and (device, dtype) != ("cpu", "float32"):
        raise ValueError(f"tunix is compared on the CPU in float32, not on {device} in {dtype}")
    wanted = {"ours": ours, "trl": trl, "tunix": tunix}
    with tempfile.TemporaryDirectory() as folder:
        work = Work(
            folder=folder,
            prompts=prompts,
            completions=completions,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            dtype=dtype,
            device=device,
        )
        sides = [
            _side(kind, setting, work, tunix_python if kind == "tunix" else sys.executable)
            for kind in ((*peers, "ours") if device == "cpu" else ("ours", *peers))
            for setting in _list(wanted[kind] or DEFAULT_SETTINGS[device][kind])
        ]
        _note(f"random weights of {shape}")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:  # for this one only waits
            platform = sides[0].environment["JAX_PLATFORMS"]
            pool.submit(_save_random_model, shape, folder, platform, "tunix" in peers).result()
        print(f"{shape}, {prompts} x {completions} completions, {prompt_tokens} + {new_tokens} tokens, ", end="")
        print(f"{dtype}, {device}, median of {rounds} steps\n", flush=True)
        table = Table(work)
        if device == "cpu":
            table.add(_measure_in_turns(sides, rounds, warm_up))
        for side in sides if device != "cpu" else ():
            figures, batch = _measure_alone(side, rounds, warm_up)
            table.add({side.name: figures})
            if batch is not None:
                _check_behind(side, batch, sides[0])


def _save_random_model(shape: str, folder: str, platform: str, as_tunix: bool) -> None:
    """Write the checkpoint that all sides start from, drawn on that platform; with the RoPE that tunix has, if so."""
    import jax

    from models.llama import PRESETS, LLaMa, save_pretrained

    jax.config.update("jax_platforms", platform)
    config = PRESETS[shape]
    if as_tunix:
        config = dataclasses.replace(config, rope_theta=float(TUNIX_ROPE_THETA), rope_scaling=None)
    save_pretrained(jax.jit(lambda key: LLaMa(config, key=key))(jax.random.key(0)), folder)


def _check(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{name} {value!r} is none of {', '.join(known)}")
    return value


def _list(text: str | tuple) -> list[str]:
    """Items of a comma-separated flag, which python-fire may have parsed already."""
    items = text if isinstance(text, tuple | list) else text.split(",")
    return [str(item) for item in items if item]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One of those that are compared: how its row is called, its order, and how its process is started."""

    name: str
    order: Order
    python: str
    environment: dict[str, str]


def _side(kind: str, setting: str, work: Work, python: str) -> Side:
    words = tuple(setting.split("+")) if setting != "plain" else ()
    check_settings(kind, words)
    order = Order(kind=kind, settings=words, work=work)
    unit = work.completions if kind == "tunix" else 1  # it cuts prompts, with all of their completions
    if work.rows % order.micro() or order.micro() % unit:
        raise ValueError(f"{work.prompts} x {work.completions} completions cannot be cut into {setting} for {kind}")
    environment = {"JAX_PLATFORMS": {"gpu": "cuda"}.get(work.device, work.device), "HF_HUB_OFFLINE": "1"}
    environment |= huge_pages_environment() if "pages" in words else {}
    name = " ".join(["ropewalk" if kind == "ours" else kind, *words])
    return Side(name=name, order=order, python=python, environment=environment)


class Process:
    """A side at work, until it is closed. Raises RuntimeError with its last words where it ends before."""

    def __init__(self, side: Side, checks: list[dict]):
        self._name = side.name
        _note(f"{side.name}: starts")
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [side.python, "-m", "benchmarks.grpo_sides"],
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
            _note(f"{self._name}: {figures['note']}")
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


def _measure_in_turns(sides: list[Side], rounds: int, warm_up: int) -> dict[str, dict[str, Any]]:
    """By name: the first step's seconds, medians of PARTS, peak bytes; or the error of a peer that fails.

    Ours come last: they check what the others have done. Raises ValueError where a side has not done the work.
    """
    figures: dict[str, dict[str, Any]] = {}
    batches: dict[str, dict] = {}
    with contextlib.ExitStack() as stack:
        running = []
        for side in sides:
            process = Process(side, list(batches.values()) if side.order.kind == "ours" else [])
            stack.callback(process.close)
            try:
                if side.order.kind == "ours" and batches:
                    _check_peers(batches, process.checks(), side.order.work.dtype)
                step = _checked_step(side, process)
            except RuntimeError as error:  # such as too little memory, or no compiler
                if side.order.kind == "ours":
                    raise
                figures[side.name] = {"error": str(error)}
                continue
            if side.order.kind != "ours":
                batches[side.name] = _batch_of(step)
            figures[side.name] = {"first": step["seconds"]}
            running.append((side, process))
        steps: dict[str, list[dict]] = {side.name: [] for side, _ in running}
        for _ in range(warm_up - 1 + rounds):
            for side, process in running:
                steps[side.name].append(_checked_step(side, process))
    for name, taken in steps.items():
        figures[name] |= _medians(taken[-rounds:])
    return figures


def _measure_alone(side: Side, rounds: int, warm_up: int) -> tuple[dict[str, Any], dict | None]:
    """The same of one side, and a peer's first batch. One that fails later keeps its first step."""
    figures: dict[str, Any] = {}
    batch = None
    with contextlib.closing(Process(side, [])) as process:
        try:
            step = _checked_step(side, process)
            figures["first"] = step["seconds"]
            batch = None if side.order.kind == "ours" else _batch_of(step)
            taken = [_checked_step(side, process) for _ in range(warm_up - 1 + rounds)]
            figures |= _medians(taken[-rounds:])
        except RuntimeError as error:
            figures["error"] = str(error)
    return figures, batch


def _check_behind(side: Side, batch: dict, ours: Side) -> None:
    """A peer's batch done by ours in a process of its own."""
    with contextlib.closing(Process(ours, [batch])) as process:
        _note(f"{ours.name}: checks {side.name}")
        _check_peers({side.name: batch}, process.checks(), side.order.work.dtype)
        _note(f"{side.name} does the same as ours")


def _batch_of(step: dict) -> dict[str, Any]:
    """A peer's first batch and what it made of it."""
    return {**step["batch"], "grad_norm": step["grad_norm"], "entropy": step.get("entropy")}


def _medians(taken: list[dict]) -> dict[str, Any]:
    return {part: statistics.median(step[part] for step in taken) for part in PARTS} | {"peak": taken[-1]["peak"]}


_BEGAN = time.monotonic()


def _note(text: str) -> None:
    print(f"[{time.monotonic() - _BEGAN:6.1f} s] {text}", file=sys.stderr, flush=True)


def _checked_step(side: Side, process: Process) -> dict[str, Any]:
    """A step that has learnt from as many tokens as it should, with a gradient."""
    step = process.step()
    parts = ", ".join(f"{part} {step[part]:.2f}" for part in PARTS if part in step)
    _note(f"{side.name}: {parts}")
    tokens, norm = side.order.work.rows * side.order.work.new_tokens, step["grad_norm"]
    if step["tokens"] != tokens:
        raise ValueError(f"{side.name} learnt from {step['tokens']} tokens, not {tokens}")
    if norm is not None and not 0 < norm < math.inf:
        raise ValueError(f"{side.name} has a gradient of norm {norm}")
    return step


def _check_peers(theirs: dict[str, dict], ours: list[dict], dtype: str) -> None:
    """Each peer's figures of its first batch beside ours of the same."""
    for (name, their), our in zip(theirs.items(), ours, strict=True):
        for figure in ("grad_norm", "entropy"):
            if their[figure] is None:
                continue
            if not abs(our[figure] - their[figure]) <= TOLERANCES[dtype] * abs(our[figure]):
                raise ValueError(f"{figure} of ropewalk and {name} differ: {our[figure]} and {their[figure]}")


class Table:
    """Markdown with a row for each side; the last column is ours, the fastest so far, as a fraction of it."""

    def __init__(self, work: Work):
        self._work = work
        self._seconds: dict[str, dict[str, float]] = {}  # by kind and name
        columns = "side,first step s,step s,rollout s,score s,train s,new tokens/s,peak GiB,ropewalk takes"
        print("| " + " | ".join(columns.split(",")) + " |\n|---|" + "---:|" * 8, flush=True)

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
            return [f"{side['first']:.1f}, then failed" if "first" in side else "failed"] + [""] * 7
        rate = self._work.rows * self._work.new_tokens / side["rollout"]
        cells = [f"{side['first']:.1f}", *(f"{side[part]:.3f}" for part in PARTS), f"{rate:.0f}"]
        cells.append("" if side["peak"] is None else f"{side['peak'] / 2**30:.2f}")
        kind = name.split()[0]
        ours, own = self._seconds.get("ropewalk"), self._seconds[kind]
        if kind == "ropewalk" or not ours:
            return [*cells, ""]
        fastest = " (its fastest)" if side["seconds"] == min(own.values()) else ""
        return [*cells, f"{min(ours.values()) / side['seconds']:.2f}x{fastest}"]


if __name__ == "__main__":
    fire.Fire(main)
