"""The training step beside `transformers`: tokens per second, peak memory, and how far it is from what matmuls allow.

    python -m benchmarks.train --peer hf
    python -m benchmarks.train --peer hf --device gpu --shapes llama-3.2-1b --batches 8x4096 --dtype bfloat16

A step is forward, backward, clipping at 1, AdamW with weight decay on the matrices, and gradients cleared, from the
same weights on the same random tokens; the losses of the first steps must agree, or nothing is timed. `transformers`
runs eagerly and through torch.compile, with torch's scaled_dot_product_attention and fused AdamW; the faster counts.
In a batch such as 4x512:packed each row is four documents that do not see each other: segment numbers in ours, a
prepared block-diagonal mask and positions within the document in the peer.

Every side is a process of its own, so that its peak memory is its own: all that it holds, libraries and compiler too.
On a CPU all are kept waiting and take turns, so that a machine whose speed drifts slows all. An accelerator has no room
for two, and there they come one after the other. On a CPU ours has its buffers in huge pages, as the training program
sets it; `transformers` is measured both with and without.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import fire
import numpy as np

from benchmarks.train_sides import Work, batch_rows, take_turn
from utils.host import huge_pages_environment

CHECKED_STEPS = 3
# What losses may differ by, in nats: of the first step, and of those behind an update.
TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 2e-2)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One of those that are compared: its name, a key of `train_sides.SIDES`, and its environment variables."""

    name: str
    kind: str
    environment: dict[str, str]


def main(
    shapes: str = "small",
    batches: str = "8x256,4x512:packed",
    dtype: str = "float32",
    device: str = "cpu",
    steps: int = 3,
    rounds: int = 7,
    peer: str | None = None,
    remat: str | None = None,
    peer_remat: bool = False,
    plain: bool = False,
) -> None:
    """Print a Markdown table with a row for each side.

    Args:
        shapes: Names of presets.
        batches: Rows x tokens, with :packed behind it for several documents in a row.
        dtype: Of the computation; parameters and optimizer state are float32.
        device: cpu or gpu.
        steps: In each turn.
        rounds: Turns of each side; its figure is the median of their mean seconds for a step.
        peer: hf times `transformers` too.
        remat: What ours stores for the backward pass; by default what the trainer does.
        peer_remat: Turns on gradient checkpointing in the peer.
        plain: Measures all without huge pages.
    """
    _check_choice("peer", peer, (None, "hf"))
    _check_choice("device", device, ("cpu", "gpu"))
    _check_choice("dtype", dtype, tuple(TOLERANCES))
    sides = _sides(device, bool(peer), plain)
    about = _alone(sides[0].environment, _describe_device, dtype)
    print(f"{about['device']}, jax {about['jax']}, {dtype}, median of {rounds} turns of {steps} steps\n")
    columns = "shape,batch,side,first step s,step s,floor s,of the peak,tokens/s,peak GiB,ropewalk is"
    print("| " + " | ".join(columns.split(",")) + " |\n|---|---|---|" + "---:|" * 7)
    for shape in _list(shapes):
        with tempfile.TemporaryDirectory() as folder:
            works = [
                Work(folder=folder, batch=batch, dtype=dtype, device=device, remat=remat, peer_remat=peer_remat)
                for batch in _list(batches)
            ]
            flops = _alone(sides[0].environment, _prepare, shape, works)
            for work, count in zip(works, flops):
                figures = _measure(sides, work, steps, rounds)
                if about["source"] == "measured":  # again, for the first time may have been a bad moment
                    about["peak"] = max(about["peak"], _alone(sides[0].environment, _describe_device, dtype)["peak"])
                _print_rows(shape, work, count / about["peak"], figures)
    print(f"\nPeak of matrix products: {about['peak'] / 1e12:.3f} TFLOP/s, {about['source']}.")


def _check_choice(name: str, value: str | None, known: tuple) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is none of {', '.join(map(str, known))}")


def _list(text: str | tuple) -> list[str]:
    """Items of a comma-separated flag, which python-fire may have parsed already."""
    return [str(item) for item in text] if isinstance(text, tuple | list) else str(text).split(",")


def _sides(device: str, peer: bool, plain: bool) -> list[Side]:
    platform = {"JAX_PLATFORMS": {"gpu": "cuda"}.get(device, device)}
    pages = {} if plain or device != "cpu" else huge_pages_environment()
    sides = [Side(name="ropewalk", kind="ours", environment=platform | pages)]
    for kind in ("hf eager", "hf compiled") if peer else ():
        sides.append(Side(name=kind, kind=kind, environment=platform))
        if pages:
            sides.append(Side(name=f"{kind}, huge pages", kind=kind, environment=platform | pages))
    return sides


@contextlib.contextmanager
def _process(environment: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """A new process with these variables: call(function, *arguments) -> its result there."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            pool.submit(os.getpid).result()
        finally:
            os.environ.clear()
            os.environ.update(before)
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def _alone(environment: dict[str, str], function: Callable, *arguments: Any) -> Any:
    with _process(environment) as call:
        return call(function, *arguments)


def _describe_device(dtype: str) -> dict[str, Any]:
    """Its name, and the FLOP/s that it can do in matrix products: what its maker states, else what it is seen to do."""
    import jax

    from trainers.flops import measured_matmul_peak, peak_flops

    kind = jax.devices()[0].device_kind
    stated = peak_flops(kind, dtype)
    source = "measured" if stated is None else "as its maker states"
    peak = measured_matmul_peak(dtype) if stated is None else stated
    return {"device": kind, "jax": jax.__version__, "peak": peak, "source": source}


def _prepare(shape: str, works: list[Work]) -> list[int]:
    """Write the checkpoint that all start from; the FLOPs of a step on each batch."""
    import jax

    from models.llama import PRESETS, LLaMa, save_pretrained
    from trainers.flops import document_lengths, training_flops

    config = PRESETS[shape]
    save_pretrained(jax.jit(lambda key: LLaMa(config, key=key))(jax.random.key(0)), works[0].folder)
    return [training_flops(config, document_lengths(batch_rows(work)["segments_BT"])) for work in works]


def _measure(sides: list[Side], work: Work, steps: int, rounds: int) -> dict[str, dict]:
    """By name: the first step's seconds, the median of the later ones', peak bytes; or the error of a peer that fails.

    Raises ValueError where losses differ.
    """
    figures: dict[str, dict] = {}
    for group in [sides] if work.device == "cpu" else [[side] for side in sides]:
        with contextlib.ExitStack() as stack:
            calls = {}
            for side in group:
                call = stack.enter_context(_process(side.environment))
                try:
                    figures[side.name] = _first_steps(call, side.kind, work)
                    calls[side.name] = call, side.kind
                except (RuntimeError, BrokenProcessPool) as error:  # such as too little memory, or no compiler
                    if side.kind == "ours":
                        raise
                    figures[side.name] = {"error": (str(error).splitlines() or [type(error).__name__])[0]}
            _check_losses(figures, work.dtype)
            turns: dict[str, list[dict]] = {name: [] for name in calls}
            for _ in range(rounds):
                for name, (call, kind) in calls.items():
                    turns[name].append(call(take_turn, kind, work, steps))
        for name, taken in turns.items():
            figures[name]["step"] = statistics.median(turn["seconds"] / steps for turn in taken)
            figures[name]["peak"] = taken[-1]["peak"]
    return figures


def _first_steps(call: Callable, kind: str, work: Work) -> dict[str, Any]:
    """A first step, which compiles, and some more, which are not timed."""
    first = call(take_turn, kind, work, 1)
    more = call(take_turn, kind, work, CHECKED_STEPS - 1)
    return {"first": first["seconds"], "losses": first["losses"] + more["losses"]}


def _check_losses(figures: dict[str, dict], dtype: str) -> None:
    ours = np.array(figures["ropewalk"]["losses"])
    first, later = TOLERANCES[dtype]
    for name, theirs in figures.items():
        difference = abs(np.array(theirs.get("losses", ours)) - ours)
        if not (difference[0] <= first and (difference <= later).all()):
            raise ValueError(f"losses of ropewalk and {name} differ: {ours.tolist()} and {theirs['losses']}")


def _print_rows(shape: str, work: Work, floor: float, figures: dict[str, dict]) -> None:
    """A row for each side; the last column is how many times as fast as it ours is."""
    rows, length = work.size
    fastest = min((side["step"] for name, side in figures.items() if name != "ropewalk" and "step" in side), default=0)
    for name, side in figures.items():
        if "error" in side:
            cells = ["failed"] + [""] * 6
            print(f"{name}: {side['error']}", file=sys.stderr)
        else:
            step, peak = side["step"], side["peak"]
            cells = [f"{side['first']:.1f}", f"{step:.3f}", f"{floor:.3f}", f"{floor / step:.0%}"]
            cells += [f"{rows * length / step:.0f}", "" if peak is None else f"{peak / 2**30:.2f}"]
            ratio = f"{step / figures['ropewalk']['step']:.2f}x" + (" (its fastest)" if step == fastest else "")
            cells.append("" if name == "ropewalk" else ratio)
        print("| " + " | ".join([shape, work.batch, name, *cells]) + " |", flush=True)


if __name__ == "__main__":
    fire.Fire(main)
