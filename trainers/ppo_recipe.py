"""Runs of PPO: see `trainers.rollout_recipe`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from models.llama import LLaMa, LlamaConfig, load_config
from models.llama.scalar import ScalarLLaMa, load_scalar, random_scalar
from models.llama.tokenizer import Tokenizer
from trainers import parts
from trainers.actor_critic import ActorCritic
from trainers.memory_plan import Setting, laid_out, network_of
from trainers.ppo_experience import PPOBatch, PPOExperience
from trainers.ppo_settings import PPORunConfig
from trainers.rollout_recipe import RolloutRecipe, check_length
from utils.sharding import named_sharding


class PPORecipe(RolloutRecipe):
    config = PPORunConfig
    command = "ppo"

    def experience(self, config: PPORunConfig, model: ActorCritic, /, *arguments: Any, **options: Any) -> PPOExperience:
        return PPOExperience(*arguments, seed=config.trainer.seed, **options)

    def check(self, config: PPORunConfig, llama: LlamaConfig, tokenizer: Tokenizer) -> None:
        if config.critic.checkpoint is not None:
            critic_config(config, llama)
            parts.check_tokenizer("critic.checkpoint", config.critic.checkpoint, tokenizer)

    def sizes(self, setting: Setting) -> Mapping[str, Any]:
        own = None if setting.config.critic.kind == "head" else critic_config(setting.config, setting.llama)
        return {**super().sizes(setting), "second": None if own is None else network_of(own)}

    def needs_reference(self, config: PPORunConfig) -> bool:
        return config.experience.kl_coef > 0

    def updates(self, config: PPORunConfig) -> tuple[int, int]:
        return config.experience.mini_batches, config.experience.epochs

    def policy_of(self, model: ActorCritic) -> LLaMa:
        return model.policy

    def make_model(self, config: PPORunConfig, llama: LlamaConfig, mesh: Mesh, *, random: bool) -> ActorCritic:
        own, seed = config.critic, config.trainer.seed
        policy = super().make_model(config, llama, mesh, random=random)
        if own.kind == "head":
            zeros_D = jnp.zeros(llama.hidden_size, jnp.float32, device=named_sharding("D", (llama.hidden_size,), mesh))
            return ActorCritic(policy, value_D=zeros_D)
        dtype, path = jnp.dtype(config.model.dtype), own.checkpoint or config.model.checkpoint
        if random or path is None:
            network = critic_config(config, llama)
            scalar = random_scalar(network, key=jax.random.key(seed), dtype=dtype, mesh=mesh)
        else:
            scalar = load_scalar(path, dtype=dtype, mesh=mesh)
        head_D = scalar.score_D[...] if own.checkpoint is not None else jnp.zeros_like(scalar.score_D[...])
        return ActorCritic(policy, critic=ScalarLLaMa(parts.adapted(scalar.llama, config), head_D))

    def abstract_model(self, config: PPORunConfig, llama: LlamaConfig, mesh: Mesh) -> ActorCritic:
        dtype = jnp.dtype(config.model.dtype)
        network = None if config.critic.kind == "head" else critic_config(config, llama)

        def make(key: Any) -> ActorCritic:
            policy = parts.adapted(LLaMa(llama, key=key, dtype=dtype), config)
            if network is None:
                return ActorCritic(policy, value_D=jnp.zeros(llama.hidden_size))
            scalar = random_scalar(network, key=key, dtype=dtype)
            return ActorCritic(policy, critic=ScalarLLaMa(parts.adapted(scalar.llama, config), scalar.score_D[...]))

        return laid_out(make, mesh)

    def exports(self, model: ActorCritic) -> Mapping[str, nnx.Module]:
        return {"hf": model.policy} | ({} if model.critic is None else {"critic": model.critic})

    def abstract_batch(self, config: PPORunConfig, sizes: tuple[int, int, int, int]) -> PPOBatch:
        B, C, M, S = sizes
        numbers = ("mask_BCM", "old_logprobs_BCM", "old_values_BCM", "advantages_BCM", "returns_BCM")
        return PPOBatch(
            prompts_BS=jax.ShapeDtypeStruct((B, S), jnp.int32),
            prompt_lengths_B=jax.ShapeDtypeStruct((B,), jnp.int32),
            completions_BCM=jax.ShapeDtypeStruct((B, C, M), jnp.int32),
            **dict.fromkeys(numbers, jax.ShapeDtypeStruct((B, C, M), jnp.float32)),
        )


def critic_config(config: PPORunConfig, llama: LlamaConfig) -> LlamaConfig:
    """What the network of a separate critic is. Raises ValueError for one that cannot read what the policy writes."""
    path = config.critic.checkpoint
    if path is None:
        return llama
    parts.check_there("critic.checkpoint", path)
    own = load_config(path)
    if own.vocab_size != llama.vocab_size:
        raise ValueError(
            f"critic.checkpoint {path} has {own.vocab_size} token ids, the policy {llama.vocab_size}: they do not "
            "belong together"
        )
    check_length(config, own, whose="critic.checkpoint's")
    return own
