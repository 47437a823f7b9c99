"""The sides that `benchmarks.dpo` compares: DPO by ours, by TRL and by tunix, each a program of its own.

    python -m benchmarks.dpo_sides

takes turns as `benchmarks.turns` has it. What is heavy is imported where it is used: a peer may run in an environment
that has nothing but the peer and numpy.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.dpo_peers import trl_side, tunix_side
from benchmarks.dpo_work import BETA, Work
from benchmarks.peers import BETAS, EPSILON, LEARNING_RATE, MAX_NORM
from benchmarks.turns import Order, Turns, serve


def _ours(order: Order, turns: Turns) -> None:
    """The trainer as the training program has it."""
    import jax

    from models.llama import load_pretrained
    from trainers.flops import peak_memory_bytes
    from trainers.metrics import Throughput

    work = order.work
    trainer, throughput = _our_trainer(order), Throughput()
    state = trainer.init(load_pretrained(work.folder), jax.random.key(0))
    batches = (_our_batch(work, step) for step in itertools.count())
    while True:
        turns.wait()
        batch, _ = trainer.prepare(state, batches, throughput)
        state, metrics = trainer.step(state, batch)
        jax.block_until_ready(state.model)
        figures = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
        turns.done(seconds=turns.elapsed(), **figures, peak=peak_memory_bytes())


def _our_trainer(order: Order) -> Any:
    from models.llama import load_pretrained
    from trainers.dpo_trainer import DPOTrainer
    from trainers.optimizers import OptimizerConfig, make_optimizer
    from trainers.policy import PolicyConfig
    from trainers.preference_losses import PreferenceLossConfig
    from trainers.reference import Reference

    micro_batches = order.work.pairs // order.micro()
    prompts = [word for word in order.settings if word in ("shared", "repeated")]
    remat = [word for word in order.settings if word in ("none", "dots", "block", "everything")]
    chosen = {name: words[-1] for name, words in (("prompts", prompts), ("remat", remat)) if words}
    policy = PolicyConfig(**chosen)
    b1, b2 = BETAS
    config = OptimizerConfig(schedule="constant", b1=b1, b2=b2, eps=EPSILON)
    optimizer = make_optimizer(config, learning_rate=LEARNING_RATE, num_steps=10**6)
    return DPOTrainer(
        optimizer.transformation,
        PreferenceLossConfig(beta=BETA),
        policy=policy,
        reference=Reference(load_pretrained(order.work.reference), policy=policy, micro_batches=micro_batches),
        learning_rate=optimizer.learning_rate,
        accumulation_steps=micro_batches,
        max_grad_norm=MAX_NORM,
        compute_dtype="float32",
    )


def _our_batch(work: Work, step: int) -> Any:
    from trainers.preference_batch import PreferenceBatch

    ids = work.batch(step)
    B, S = ids["prompt"].shape
    completions_BCM = np.stack([ids["chosen"], ids["rejected"]], axis=1)
    return PreferenceBatch(
        prompts_BS=ids["prompt"],
        prompt_lengths_B=np.full(B, S, np.int32),
        completions_BCM=completions_BCM,
        mask_BCM=np.ones(completions_BCM.shape, np.float32),
        lengths_BC=np.full((B, 2), work.completion_tokens, np.int32),
        weights_B=np.ones(B, np.float32),
    )


SIDES: dict[str, Callable[[Order, Turns], None]] = {"ours": _ours, "trl": trl_side, "tunix": tunix_side}

if __name__ == "__main__":
    serve(SIDES, Work)
