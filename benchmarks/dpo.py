"""A step of DPO beside TRL and tunix: seconds, and how far they are from what matrix products allow.

    python -m benchmarks.dpo --peer trl
    python -m benchmarks.dpo --peer trl,tunix --tunix_python .venv.tunix/bin/python

A step learns from pairs of completions, each pair of one prompt, all of the same number of tokens: the sigmoid loss,
the log-probabilities of a reference computed in the step, clipping at 1, AdamW; in float32 on the CPU. Every side
starts from the same random weights, has the same other random weights as its reference, so that the first loss is not
that of the start, and learns from the same pairs. The loss and the norm of the gradient of every peer's first step
must be ours, or nothing is timed. The peers' own trainers run in their own loops, without evaluations and checkpoints.

Every side is a process of its own; all are kept waiting and take turns, a step each, so that a machine whose speed
drifts slows all. What is being run, and how long each step took, goes to standard error.

The floor is what a step has to multiply at least, each prompt counted once and logits of completions alone, at the peak
of matrix products that the machine is seen to reach: four forward passes' worth, of which the reference has one.

Settings of a side are words joined by +, and a peer is timed once for each setting in its list:

    pages          its buffers in huge pages, as the training program has them
    microN         N pairs in a micro-batch; by default all are in one
    shared         ours: each prompt is run once for its pair, the default
    repeated       ours: in front of each completion
    none, dots, block, everything    ours: what is stored for the backward pass, as `remat` of the policy
    checkpointing  TRL: activations are computed again in the backward pass
    compiled       TRL: torch.compile
    plain          none of them
"""

import math
import statistics
import sys
import tempfile
from pathlib import Path
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
from benchmarks.dpo_work import SETTINGS, Work
from benchmarks.peers import save_random_model
from benchmarks.turns import Order, check_settings

DEFAULT_SETTINGS = {
    "ours": "pages",
    "trl": "plain,pages,micro4,compiled,micro4+compiled,checkpointing",
    "tunix": "plain,pages",
}
TOLERANCE = 1e-3  # relative, of losses and of norms of gradients


def main(
    peer: str = "",
    shape: str = "small",
    pairs: int = 8,
    prompt_tokens: int = 128,
    completion_tokens: int = 128,
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
        pairs: In a step.
        prompt_tokens: In each prompt.
        completion_tokens: In each completion, of which a pair has two.
        rounds: Timed steps of each side; its figure is their median.
        warm_up: Steps before, of which the first compiles.
        ours: Settings of ours.
        trl: Settings of TRL, by default those that may be its fastest.
        tunix: Settings of tunix.
        tunix_python: Interpreter of an environment that has tunix.
    """
    peers = [check_known("peer", name, ("trl", "tunix")) for name in items_of(peer)]
    wanted = {"ours": ours, "trl": trl, "tunix": tunix}
    with tempfile.TemporaryDirectory() as folder:
        work = Work(
            folder=folder,
            reference=str(Path(folder) / "reference"),
            pairs=pairs,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
        )
        sides = [
            _side(kind, setting, work, tunix_python if kind == "tunix" else sys.executable)
            for kind in (*peers, "ours")
            for setting in items_of(wanted[kind] or DEFAULT_SETTINGS[kind])
        ]
        note(f"random weights of {shape}, twice")
        for seed, where in enumerate((work.folder, work.reference)):
            alone(save_random_model, shape, where, "cpu", "tunix" in peers, seed)
        peak = alone(_matmul_peak)
        figures = measure_in_turns(sides, rounds, warm_up, RULES)
    peak = max(peak, alone(_matmul_peak))  # again, for the first time may have been a bad moment
    floor = alone(step_flops, shape, pairs, prompt_tokens, completion_tokens) / peak
    print(f"{shape}, {pairs} pairs, {prompt_tokens} + {completion_tokens} tokens, float32, median of {rounds} steps\n")
    _table(pairs, floor).add(figures)
    print(f"\nFloor: {floor:.3f} s at {peak / 1e12:.3f} TFLOP/s, the measured peak of matrix products.")


def _side(kind: str, setting: str, work: Work, python: str) -> Side:
    words = settings_of(setting)
    check_settings(kind, words, SETTINGS)
    order = Order(kind=kind, settings=words, work=work)
    if work.pairs % order.micro():
        raise ValueError(f"{work.pairs} pairs cannot be cut into {setting}")
    return Side(order=order, module="benchmarks.dpo_sides", python=python, platform="cpu")


def step_flops(shape: str, pairs: int, prompt_tokens: int, completion_tokens: int) -> int:
    """What a step has to do at least, counted as in `trainers.flops`: see the head of this file."""
    from models.llama import PRESETS
    from trainers.flops import attention_flops, matrix_flops

    config, behind = PRESETS[shape], prompt_tokens + completion_tokens
    unembedding = 2 * config.hidden_size * config.vocab_size
    tokens = prompt_tokens + 2 * completion_tokens
    matrices = tokens * (matrix_flops(config) - unembedding) + 2 * completion_tokens * unembedding
    attention = 2 * attention_flops(config, [behind]) - attention_flops(config, [prompt_tokens])
    return 4 * pairs * (matrices + attention)


def _matmul_peak() -> float:
    import jax

    from trainers.flops import measured_matmul_peak

    jax.config.update("jax_platforms", "cpu")
    return measured_matmul_peak("float32")


def _first_step(side: Side, process: Process, firsts: dict[str, dict]) -> dict[str, Any]:
    """A first step; ours must have been as the peers' were."""
    step = _checked_step(side, process)
    for name, theirs in firsts.items() if side.order.kind == "ours" else ():
        for figure in ("loss", "grad_norm"):
            check_same(figure, step[figure], name, theirs[figure], TOLERANCE)
    return step


def _checked_step(side: Side, process: Process) -> dict[str, Any]:
    """A step that had a loss and a gradient."""
    step = process.step()
    note(f"{side.name}: {step['seconds']:.2f} s, loss {step['loss']:.4f}, norm of the gradient {step['grad_norm']:.4f}")
    if not (math.isfinite(step["loss"]) and 0 < step["grad_norm"] < math.inf):
        raise ValueError(f"{side.name} has a loss of {step['loss']} and a gradient of norm {step['grad_norm']}")
    return step


def _sum_up(taken: list[dict]) -> dict[str, Any]:
    return {"seconds": statistics.median(step["seconds"] for step in taken), "peak": taken[-1]["peak"]}


RULES = Rules(checks=lambda firsts: [], first_step=_first_step, step=_checked_step, sum_up=_sum_up)


def _table(pairs: int, floor: float) -> Table:
    def cells(side: dict[str, Any]) -> list[str]:
        return [f"{pairs / side['seconds']:.2f}", f"{floor / side['seconds']:.0%}"]

    return Table(("pairs/s", "of the peak"), cells)


if __name__ == "__main__":
    fire.Fire(main)
