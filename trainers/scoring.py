"""Log-probabilities of completions without gradients: what updates compare with, taken before them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from flax import nnx

from trainers.policy import Completions, PolicyConfig, completion_log_probs
from trainers.trainer import cut, joined
from utils.shapes import Array


def log_probs_of(
    model: nnx.Module, batch: Completions, *, micro_batches: int, temperature: float, config: PolicyConfig
) -> tuple[Array, Array]:
    """Log-probabilities and entropies [B, C, M], float32, nats, one micro-batch after another; to be compiled."""
    options = dict(micro_batches=micro_batches, temperature=temperature, config=config)
    return scored(completion_log_probs, model, batch, **options)


def scored(
    score: Callable[..., Any],
    model: nnx.Module,
    batch: Completions,
    *,
    micro_batches: int,
    temperature: float,
    config: PolicyConfig,
) -> tuple[Array, ...]:
    """The arrays [N, M] of score(model, batch, temperature=, config=) as [B, C, M], in the same way."""
    config = replace(config, remat="none")

    def some(batch: Completions) -> tuple[Array, ...]:
        found = score(model, batch, temperature=temperature, config=config)
        return tuple(x_NM.reshape(batch.completions_BCM.shape) for x_NM in found)

    if micro_batches == 1:
        return some(batch)
    return joined(jax.lax.map(some, cut(batch, micro_batches)))
