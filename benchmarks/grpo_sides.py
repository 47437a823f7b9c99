"""The sides that `benchmarks.grpo` compares: GRPO by ours, by TRL and by tunix, each a program of its own.

    python -m benchmarks.grpo_sides

takes turns as `benchmarks.turns` has it; an order with checks is answered too. What is heavy is imported where it is
used: a peer may run in an environment that has nothing but the peer and numpy.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.grpo_peers import trl_side, tunix_side
from benchmarks.grpo_work import Work, done, reward
from benchmarks.peers import BETAS, EPSILON, LEARNING_RATE, MAX_NORM
from benchmarks.turns import Order, Turns, serve


def _ours(order: Order, turns: Turns) -> None:
    """The trainer as the training program has it, its rollouts and its scoring."""
    import jax

    from data.prompts import Prompt
    from inference.completion import Request
    from inference.rollout import roll_out
    from models.llama import load_pretrained
    from sampling import SamplingParams
    from trainers.experience import Experience
    from trainers.flops import peak_memory_bytes
    from trainers.metrics import Throughput
    from trainers.rewards import Reward
    from trainers.rollouts import RolloutConfig

    work, micro_batches = order.work, order.work.rows // order.micro()
    rollout = RolloutConfig(max_completion_length=work.new_tokens, completions=work.completions)
    request = Request(max_new_tokens=work.new_tokens, num_samples=work.completions, sampling=SamplingParams())

    def draw(model: Any, prompts: Any, numbers: Any) -> Any:
        with turns.timed("rollout"):
            return roll_out(model, prompts, request, numbers=numbers)

    experience = Experience(
        draw,
        [Reward("checksum", reward)],
        lambda ids: " ".join(map(str, ids)),
        rollout=rollout,
        compute_dtype=work.dtype,
        micro_batches=micro_batches,
        rows=micro_batches,
    )
    trainer = _our_trainer(order, rollout, experience)
    if order.checks:
        turns.answer({"checks": [_our_figures(trainer, order, batch) for batch in order.checks]})
    state = trainer.init(load_pretrained(work.folder), jax.random.key(0))

    def batches() -> Iterator[list[Prompt]]:
        for step in itertools.count():
            ids = work.prompt_ids(step)
            yield [Prompt(ids=tuple(own), prompt=" ".join(map(str, own)), columns={}, index=0) for own in ids]

    prompts, throughput = batches(), Throughput()
    while True:
        turns.wait()
        with turns.timed("prepare"):
            batch, _ = trainer.prepare(state, prompts, throughput)
        state, metrics = trainer.step(state, batch)
        jax.block_until_ready(state.model)
        figures = {"tokens": int(batch.mask_BCM.sum()), "grad_norm": float(metrics["grad_norm"])}
        done(turns, **figures, peak=peak_memory_bytes())


def _our_trainer(order: Order, rollout: Any, experience: Any) -> Any:
    from trainers.grpo_trainer import GRPOTrainer
    from trainers.optimizers import OptimizerConfig, make_optimizer
    from trainers.policy import PolicyConfig

    prompts = [word for word in order.settings if word in ("shared", "repeated")]
    b1, b2 = BETAS
    config = OptimizerConfig(schedule="constant", b1=b1, b2=b2, eps=EPSILON)
    optimizer = make_optimizer(config, learning_rate=LEARNING_RATE, num_steps=10**6)
    return GRPOTrainer(
        optimizer.transformation,
        rollout=rollout,
        policy=PolicyConfig(prompts=prompts[-1] if prompts else "auto"),
        experience=experience,
        learning_rate=optimizer.learning_rate,
        accumulation_steps=order.work.rows // order.micro(),
        max_grad_norm=MAX_NORM,
        compute_dtype=order.work.dtype,
    )


def _our_figures(trainer: Any, order: Order, batch: dict) -> dict[str, float]:
    """What our first step makes of a peer's batch, whose rows are prompts one after another."""
    import jax

    from models.llama import load_pretrained
    from trainers.policy import PolicyBatch

    work = order.work
    B = math.lcm(work.prompts, work.rows // order.micro())
    C = work.rows // B
    completions_BCM = np.array(batch["completion_ids"], np.int32).reshape(B, C, work.new_tokens)
    prompts_BCS = np.array(batch["prompt_ids"], np.int32).reshape(B, C, work.prompt_tokens)
    if (prompts_BCS != prompts_BCS[:, :1]).any():
        raise ValueError("completions of a prompt do not lie side by side")
    mask_BCM = np.ones(completions_BCM.shape, np.float32)
    rows = PolicyBatch(
        prompts_BS=prompts_BCS[:, 0],
        prompt_lengths_B=np.full(B, work.prompt_tokens, np.int32),
        completions_BCM=completions_BCM,
        mask_BCM=mask_BCM,
        advantages_BC=np.array(batch["advantages"], np.float32).reshape(B, C),
        sampler_logprobs_BCM=np.zeros_like(mask_BCM),  # which only a metric reads
        rollout_tokens_BC=mask_BCM.sum(-1),
    )
    state = trainer.init(load_pretrained(work.folder), jax.random.key(0))
    _, metrics = trainer.step(state, rows)
    return {name: float(metrics[name]) for name in ("grad_norm", "entropy")}


SIDES: dict[str, Callable[[Order, Turns], None]] = {"ours": _ours, "trl": trl_side, "tunix": tunix_side}


if __name__ == "__main__":
    serve(SIDES, Work)
