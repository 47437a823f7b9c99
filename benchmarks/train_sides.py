"""The sides that `benchmarks.train` compares, each for a process of its own: a function that runs steps.

What is heavy is imported where it is used, so that no side's memory holds the other's libraries.
"""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LEARNING_RATE, WEIGHT_DECAY, MAX_NORM, BETAS, EPSILON = 3e-4, 0.1, 1.0, (0.9, 0.95), 1e-8
DOCUMENTS = 4  # in a packed row

# run(number of steps) -> their losses, and peak() -> bytes of memory so far, None where the system does not tell.
Running = tuple[Callable[[int], list[float]], Callable[[], int | None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a side is to do: steps from the checkpoint in `folder`, on a batch such as 8x256 or 4x512:packed."""

    folder: str
    batch: str
    dtype: str
    device: str
    remat: str | None
    peer_remat: bool

    @property
    def size(self) -> tuple[int, int]:
        """Rows, and tokens in a row."""
        rows, length = self.batch.removesuffix(":packed").split("x")
        return int(rows), int(length)

    @property
    def packed(self) -> bool:
        return self.batch.endswith(":packed")


def batch_rows(work: Work) -> dict[str, np.ndarray]:
    """The fields of `data.batch.Batch`, the same in every process; no row has padding."""
    B, T = work.size
    rng = np.random.default_rng(0)
    vocabulary = json.loads((Path(work.folder) / "config.json").read_text())["vocab_size"]
    tokens_BT1 = rng.integers(0, vocabulary, (B, T + 1), np.int32)
    starts_BT = np.zeros((B, T), bool)
    starts_BT[:, 0] = True
    if work.packed:
        for row in starts_BT:
            row[rng.choice(np.arange(1, T), DOCUMENTS - 1, replace=False)] = True
    places_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    ends_BT = np.append(starts_BT[:, 1:], np.zeros((B, 1), bool), axis=1)
    return {
        "tokens_BT": tokens_BT1[:, :-1],
        "targets_BT": tokens_BT1[:, 1:],
        "weights_BT": (~ends_BT).astype(np.float32),
        "segments_BT": np.cumsum(starts_BT, axis=1, dtype=np.int32),
        "positions_BT": places_BT - np.maximum.accumulate(np.where(starts_BT, places_BT, 0), axis=1),
    }


def take_turn(kind: str, work: Work, num_steps: int) -> dict[str, Any]:
    """Some steps of a side, in the process that calls this: seconds, each step's loss, and peak bytes so far."""
    run, peak = _side(kind, work)
    started = time.perf_counter()
    losses = run(num_steps)
    return {"seconds": time.perf_counter() - started, "losses": losses, "peak": peak()}


@functools.cache
def _side(kind: str, work: Work) -> Running:
    """run(number of steps) -> their losses, and peak() -> bytes; what they train is kept in this process."""
    return SIDES[kind](work)


def _ours(work: Work) -> Running:
    import jax

    from data.batch import Batch
    from models.llama import load_pretrained
    from trainers.flops import peak_memory_bytes
    from trainers.language_model import LanguageModelConfig
    from trainers.optimizers import OptimizerConfig, make_optimizer
    from trainers.pretrain_trainer import PretrainTrainer

    b1, b2 = BETAS
    config = OptimizerConfig(schedule="constant", weight_decay=WEIGHT_DECAY, b1=b1, b2=b2, eps=EPSILON)
    optimizer = make_optimizer(config, learning_rate=LEARNING_RATE, num_steps=1000)
    trainer = PretrainTrainer(
        optimizer.transformation,
        LanguageModelConfig() if work.remat is None else LanguageModelConfig(remat=work.remat),
        learning_rate=optimizer.learning_rate,
        max_grad_norm=MAX_NORM,
        compute_dtype=work.dtype,
    )
    batch = Batch(**batch_rows(work))
    state = trainer.init(load_pretrained(work.folder), jax.random.key(0))

    def run(num_steps: int) -> list[float]:
        nonlocal state
        losses = []
        for _ in range(num_steps):
            state, metrics = trainer.step(state, batch)
            losses.append(metrics["loss"])
        jax.block_until_ready(state.model)
        return [float(loss) for loss in losses]

    return run, peak_memory_bytes


def _hf(work: Work, *, compiled: bool) -> Running:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where = {"gpu": "cuda"}.get(work.device, work.device)
    if where == "cuda":
        torch.set_float32_matmul_precision("high")  # TensorFloat-32, as jax does unasked
    network = transformers.AutoModelForCausalLM.from_pretrained(
        work.folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    network = network.to(where).train()
    if work.peer_remat:
        network.gradient_checkpointing_enable()
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in network.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)
    forward, inputs = torch.compile(network) if compiled else network, _hf_inputs(work, where)

    def step() -> torch.Tensor:
        with torch.autocast(where, torch.bfloat16, enabled=work.dtype == "bfloat16"):
            loss = forward(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def run(num_steps: int) -> list[float]:
        losses = [step() for _ in range(num_steps)]
        if where == "cuda":
            torch.cuda.synchronize()
        return [loss.item() for loss in losses]

    return run, torch.cuda.max_memory_allocated if where == "cuda" else _peak_resident_bytes


def _hf_inputs(work: Work, where: str) -> dict[str, Any]:
    """Arguments of the network; without documents to keep apart neither mask nor positions, which is its fastest."""
    import torch

    rows = {name: torch.tensor(array, device=where) for name, array in batch_rows(work).items()}
    targets = rows["targets_BT"].long().masked_fill(rows["weights_BT"] == 0, -100)
    inputs = {"input_ids": rows["tokens_BT"].long(), "labels": targets, "shift_labels": targets}
    if work.packed:
        segments = rows["segments_BT"]
        T = segments.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=where).tril()
        inputs["attention_mask"] = (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]
        inputs["position_ids"] = rows["positions_BT"].long()
    return inputs


SIDES: dict[str, Callable] = {
    "ours": _ours,
    "hf eager": functools.partial(_hf, compiled=False),
    "hf compiled": functools.partial(_hf, compiled=True),
}


def _peak_resident_bytes() -> int | None:
    """Linux's record of this process; None elsewhere."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
    return None
