"""A student of half its teacher's width: distilled beside trained on hard labels, on the same texts.

    python -m benchmarks.distillation --checkpoint stories260k/hf

The texts are drawn from the teacher, from its BOS at temperature 1. Both students of a seed begin with the same random
weights and see the same rows in the same order, once, under the same optimizer: one learns the tokens that were drawn,
the other what the teacher predicts for each place.
"""

import sys
from dataclasses import replace

import fire
import jax
import numpy as np
import optax

from data.batch import Batch
from inference.rollout import sampler
from models.llama import LLaMa, LlamaConfig, load_pretrained, load_tokenizer
from models.llama.init import random_model
from trainers.distill_trainer import DistillTrainer
from trainers.distillation import DistillConfig
from trainers.optimizers import OptimizerConfig, make_optimizer
from trainers.pretrain_trainer import PretrainTrainer
from trainers.trainer import Trainer

_HELD_OUT = 256  # texts to validate on
_AT_ONCE = 256  # texts that are drawn together


def main(
    checkpoint: str,
    seeds: int = 3,
    texts: int = 4096,
    tokens: int = 256,
    rows: int = 8,
    learning_rate: float = 1e-2,
    kind: str = "forward_kl",
    temperature: float = 1.0,
) -> None:
    """Print a Markdown table of validation cross-entropies, and whether the distilled student is better for all seeds.

    Args:
        checkpoint: The teacher, with a tokenizer that has a BOS.
        seeds: Of weights and order, from 0 on.
        texts: Drawn to train on; each is a row, and seen once.
        tokens: Drawn for each text, behind the BOS.
        rows: Of a step.
        learning_rate: At its peak.
        kind: Of divergence, see `trainers.distillation_losses`.
        temperature: Of the divergence.
    """
    teacher, bos = load_pretrained(checkpoint), load_tokenizer(checkpoint).bos_id
    drawn = draw(teacher, bos, texts + _HELD_OUT, tokens)
    train, held_out = drawn[:texts], [batch_of(part) for part in np.split(drawn[texts:], _HELD_OUT // 64)]
    config, steps = half(teacher.config), texts // rows
    big, small = (sum(leaf.size for leaf in jax.tree.leaves(own)) for own in (teacher, student(config, 0)))
    print(f"{texts} texts of {tokens} tokens, {steps} steps of {rows}; a teacher of {big:,} parameters, students of ")
    print(f"{small:,}; {kind} at temperature {temperature}; nats per token of {_HELD_OUT} other texts\n")
    floor = nll(teacher, held_out)
    print("| seed | hard labels | distilled | difference | teacher |\n|---|---:|---:|---:|---:|")
    lower = []
    for seed in range(seeds):
        hard = PretrainTrainer(optimizer(learning_rate, steps))
        soft = DistillTrainer(
            optimizer(learning_rate, steps), DistillConfig(kind=kind, temperature=temperature), teacher=teacher
        )
        nlls = [trained(own, config, train, held_out, rows=rows, seed=seed) for own in (hard, soft)]
        lower.append(nlls[1] < nlls[0])
        print(f"| {seed} | {nlls[0]:.4f} | {nlls[1]:.4f} | {nlls[1] - nlls[0]:+.4f} | {floor:.4f} |", flush=True)
    print(f"\nthe distilled student is better for {sum(lower)} of {seeds} seeds")


def draw(teacher: LLaMa, bos: int, count: int, tokens: int) -> np.ndarray:
    """Texts [count, 1 + tokens] of token ids that begin with BOS."""
    roll_out = sampler(
        max_new_tokens=tokens,
        num_samples=1,
        temperature=1.0,
        top_k=None,
        top_p=1.0,
        min_p=0.0,
        stop_ids=frozenset(),
        seed=0,
        rows_at_once=_AT_ONCE,
    )
    print(f"drawing {count} texts", file=sys.stderr, flush=True)
    drawn = roll_out(teacher, [[bos]] * count, range(count)).tokens_BM
    return np.concatenate([np.full((count, 1), bos, np.int32), drawn], axis=1)


def half(config: LlamaConfig) -> LlamaConfig:
    """The network of half the width: as many layers, half as many heads, as wide as before."""
    return replace(
        config,
        hidden_size=config.hidden_size // 2,
        intermediate_size=config.intermediate_size // 2,
        num_heads=config.num_heads // 2,
        num_kv_heads=config.num_kv_heads // 2,
    )


def student(config: LlamaConfig, seed: int) -> LLaMa:
    return random_model(config, key=jax.random.key(seed))


def optimizer(learning_rate: float, steps: int):
    config = OptimizerConfig(name="adamw", schedule="cosine", warmup=0.05)
    return make_optimizer(config, learning_rate=learning_rate, num_steps=steps).transformation


def nll(model: LLaMa, batches: list[Batch]) -> float:
    """Nats per token."""
    return PretrainTrainer(optax.identity()).evaluate(model, batches)["nll"]


def trained(
    trainer: Trainer, config: LlamaConfig, texts: np.ndarray, held_out: list[Batch], *, rows: int, seed: int
) -> float:
    """The validation cross-entropy of a student that has seen all texts once, in an order of the seed."""
    print(f"{type(trainer).__name__}, seed {seed}", file=sys.stderr, flush=True)
    order = np.random.default_rng(seed).permutation(len(texts))
    batches = (batch_of(texts[own]) for own in order[: len(order) // rows * rows].reshape(-1, rows))
    state = trainer.init(student(config, seed), jax.random.key(seed))
    return nll(trainer.fit(state, batches, num_steps=len(texts) // rows).model, held_out)


def batch_of(texts: np.ndarray) -> Batch:
    """Texts [B, T + 1] as rows, each token but the first to be predicted."""
    tokens_BT = texts[:, :-1]
    B, T = tokens_BT.shape
    return Batch(
        tokens_BT=tokens_BT,
        targets_BT=texts[:, 1:],
        weights_BT=np.ones((B, T), np.float32),
        segments_BT=np.ones((B, T), np.int32),
        positions_BT=np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    )


if __name__ == "__main__":
    fire.Fire(main)
