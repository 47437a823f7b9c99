"""Runs of GRPO: see `trainers.rollout_recipe`."""

from typing import Any

import jax
import jax.numpy as jnp

from models.llama import LLaMa
from trainers.experience import Experience
from trainers.policy import PolicyBatch
from trainers.rollout_recipe import RolloutRecipe
from trainers.settings import GRPORunConfig


class GRPORecipe(RolloutRecipe):
    config = GRPORunConfig
    command = "grpo"

    def experience(self, config: GRPORunConfig, model: LLaMa, /, *arguments: Any, **options: Any) -> Experience:
        return Experience(*arguments, loss=config.loss, **options)

    def needs_reference(self, config: GRPORunConfig) -> bool:
        return config.loss.beta > 0

    def updates(self, config: GRPORunConfig) -> tuple[int, int]:
        return config.experience.updates_per_rollout, config.experience.epochs_per_rollout

    def abstract_batch(self, config: GRPORunConfig, sizes: tuple[int, int, int, int]) -> PolicyBatch:
        B, C, M, S = sizes
        number_BCM, number_BC = jax.ShapeDtypeStruct((B, C, M), jnp.float32), jax.ShapeDtypeStruct((B, C), jnp.float32)
        own = config.experience
        several = own.updates_per_rollout * own.epochs_per_rollout > 1 or own.top_entropy < 1
        return PolicyBatch(
            prompts_BS=jax.ShapeDtypeStruct((B, S), jnp.int32),
            prompt_lengths_B=jax.ShapeDtypeStruct((B,), jnp.int32),
            completions_BCM=jax.ShapeDtypeStruct((B, C, M), jnp.int32),
            mask_BCM=number_BCM,
            advantages_BC=number_BC,
            sampler_logprobs_BCM=number_BCM,
            rollout_tokens_BC=number_BC,
            old_logprobs_BCM=number_BCM if several else None,
            reference_logprobs_BCM=number_BCM if config.loss.beta else None,
            weights_BCM=number_BCM if own.top_entropy < 1 else None,
        )
