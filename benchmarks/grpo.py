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
import math
import statistics
import sys
import tempfile
from typing import Any

import fire

from benchmarks.comparison import (
    Process,
    Rules,
    Side,
    Table,
    alone,
    check_known,
    check_same,
    items_of,
    measure_in_turns,
    note,
    settings_of,
)
from benchmarks.grpo_work import SETTINGS, Work
from benchmarks.peers import save_random_model
from benchmarks.turns import Order, check_settings

DEFAULT_SETTINGS = {
    "cpu": {"ours": "pages", "trl": "plain,pages,micro8,checkpointing", "tunix": "plain,pages"},
    "gpu": {"ours": "micro32", "trl": "micro16,micro16+halves,micro64+checkpointing", "tunix": "plain"},
}
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}  # relative, of norms of gradients and of entropies
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
    check_known("device", device, tuple(DEFAULT_SETTINGS))
    check_known("dtype", dtype, tuple(TOLERANCES))
    peers = [check_known("peer", name, ("trl", "tunix")) for name in items_of(peer)]
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
            for setting in items_of(wanted[kind] or DEFAULT_SETTINGS[device][kind])
        ]
        note(f"random weights of {shape}")
        alone(save_random_model, shape, folder, sides[0].platform, "tunix" in peers)
        print(f"{shape}, {prompts} x {completions} completions, {prompt_tokens} + {new_tokens} tokens, ", end="")
        print(f"{dtype}, {device}, median of {rounds} steps\n", flush=True)
        table = _table(work)
        if device == "cpu":
            table.add(measure_in_turns(sides, rounds, warm_up, RULES))
        for side in sides if device != "cpu" else ():
            figures, batch = _measure_alone(side, rounds, warm_up)
            table.add({side.name: figures})
            if batch is not None:
                _check_behind(side, batch, sides[0])


def _side(kind: str, setting: str, work: Work, python: str) -> Side:
    words = settings_of(setting)
    check_settings(kind, words, SETTINGS)
    order = Order(kind=kind, settings=words, work=work)
    unit = work.completions if kind == "tunix" else 1  # it cuts prompts, with all of their completions
    if work.rows % order.micro() or order.micro() % unit:
        raise ValueError(f"{work.prompts} x {work.completions} completions cannot be cut into {setting} for {kind}")
    platform = {"gpu": "cuda"}.get(work.device, work.device)
    return Side(order=order, module="benchmarks.grpo_sides", python=python, platform=platform)


def _measure_alone(side: Side, rounds: int, warm_up: int) -> tuple[dict[str, Any], dict | None]:
    """The same of one side, and a peer's first batch. One that fails later keeps its first step."""
    figures: dict[str, Any] = {}
    batch = None
    with contextlib.closing(Process(side)) as process:
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
        note(f"{ours.name}: checks {side.name}")
        _check_peers({side.name: batch}, process.checks(), side.order.work.dtype)
        note(f"{side.name} does the same as ours")


def _batch_of(step: dict) -> dict[str, Any]:
    """A peer's first batch and what it made of it."""
    return {**step["batch"], "grad_norm": step["grad_norm"], "entropy": step.get("entropy")}


def _medians(taken: list[dict]) -> dict[str, Any]:
    return {part: statistics.median(step[part] for step in taken) for part in PARTS} | {"peak": taken[-1]["peak"]}


def _first_step(side: Side, process: Process, firsts: dict[str, dict]) -> dict[str, Any]:
    """A first step; ours when it has done the peers' first batches as they did."""
    if side.order.kind == "ours" and firsts:
        batches = {name: _batch_of(first) for name, first in firsts.items()}
        _check_peers(batches, process.checks(), side.order.work.dtype)
    return _checked_step(side, process)


def _checked_step(side: Side, process: Process) -> dict[str, Any]:
    """A step that has learnt from as many tokens as it should, with a gradient."""
    step = process.step()
    parts = ", ".join(f"{part} {step[part]:.2f}" for part in PARTS if part in step)
    note(f"{side.name}: {parts}")
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
            if their[figure] is not None:
                check_same(figure, our[figure], name, their[figure], TOLERANCES[dtype])


RULES = Rules(
    checks=lambda firsts: [_batch_of(first) for first in firsts.values()],
    first_step=_first_step,
    step=_checked_step,
    sum_up=_medians,
)


def _table(work: Work) -> Table:
    def cells(side: dict[str, Any]) -> list[str]:
        rate = work.rows * work.new_tokens / side["rollout"]
        return [*(f"{side[part]:.3f}" for part in PARTS[1:]), f"{rate:.0f}"]

    return Table(("rollout s", "score s", "train s", "new tokens/s"), cells)


if __name__ == "__main__":
    fire.Fire(main)
