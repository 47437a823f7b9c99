"""A policy with its critic: values are of the states that tokens are drawn in."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.llama import PRESETS, HeadParam, random_scalar
from models.llama.init import random_model
from trainers.actor_critic import ActorCritic, judge
from trainers.policy import PolicyConfig, completion_log_probs
from trainers.ppo_experience import PPOBatch

NETWORK = replace(
    PRESETS["tiny"],
    num_layers=1,
    layer_windows=(None,),
    hidden_size=16,
    intermediate_size=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=32,
    tie_embeddings=False,
    initializer_range=0.3,
)
B, C, M, S = 2, 2, 5, 4


def drawn(seed: int = 0) -> PPOBatch:
    draw = np.random.default_rng(seed)
    numbers = np.zeros((B, C, M), np.float32)
    return PPOBatch(
        prompts_BS=draw.integers(1, 32, (B, S)).astype(np.int32),
        prompt_lengths_B=np.int32([4, 2]),
        completions_BCM=draw.integers(1, 32, (B, C, M)).astype(np.int32),
        mask_BCM=numbers + 1,
        old_logprobs_BCM=numbers,
        old_values_BCM=numbers,
        advantages_BCM=numbers,
        returns_BCM=numbers,
    )


def actor_critic(kind: str) -> ActorCritic:
    policy = random_model(NETWORK, key=jax.random.key(0))
    if kind == "head":
        return ActorCritic(policy, value_D=jax.random.normal(jax.random.key(1), (16,)))
    return ActorCritic(policy, critic=random_scalar(NETWORK, key=jax.random.key(2)))


@jax.jit
def judged(model: ActorCritic, batch: PPOBatch):
    return judge(model, batch, temperature=0.7, config=PolicyConfig(prompts="shared"))


@pytest.mark.parametrize("kind", ["head", "separate"])
def test_values_are_those_of_the_texts_in_front_of_each_token(kind):
    """Row by row, without padding, from the hidden states of the network that values them."""
    model, batch = actor_critic(kind), drawn()
    found = judged(model, batch)
    trunk = model.policy if kind == "head" else model.critic.llama
    head_D = np.float64((model.value_D if kind == "head" else model.critic.score_D)[...])
    for n in range(B * C):
        b, c = divmod(n, C)
        prompt = batch.prompts_BS[b, S - batch.prompt_lengths_B[b] :]
        text = np.concatenate([prompt, batch.completions_BCM[b, c]])
        x_TD = np.float64(trunk.hidden(text[None])[0][0])
        want = x_TD[len(prompt) - 1 : -1] @ head_D
        np.testing.assert_allclose(found.values_BT[n], want, rtol=1e-4, atol=1e-5)
    own = completion_log_probs(model.policy, batch, temperature=0.7, config=PolicyConfig(prompts="shared"))
    np.testing.assert_allclose(found.logprobs_BT, own.logprobs_BT, atol=1e-5)
    np.testing.assert_allclose(found.entropy_BT, own.entropy_BT, atol=1e-5)
    repeated = judge(model, batch, temperature=0.7, config=PolicyConfig(prompts="repeated"))
    np.testing.assert_allclose(found.values_BT, repeated.values_BT, atol=1e-5)


@pytest.mark.parametrize("kind", ["head", "separate"])
def test_gradients_of_values_reach_what_makes_them_and_nothing_else(kind):
    model, batch = actor_critic(kind), drawn()
    gradient = jax.jit(
        jax.grad(lambda model: judge(model, batch, temperature=1.0, config=PolicyConfig()).values_BT.sum())
    )
    found = gradient(model)
    [head_D] = jax.tree.leaves(nnx.state(found, HeadParam))
    assert np.abs(head_D).min() > 0
    of_policy = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found.policy.blocks)]
    assert not np.any(found.policy.unembed_DV[...])
    if kind == "head":
        assert min(of_policy) > 0
    else:
        assert max(of_policy) == 0
        assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(found.critic.llama.blocks))


def test_exactly_one_thing_values_states_and_it_reads_the_same_tokens():
    policy = random_model(NETWORK, key=jax.random.key(0))
    for both in ({}, {"value_D": jnp.zeros(16), "critic": random_scalar(NETWORK, key=jax.random.key(0))}):
        with pytest.raises(ValueError, match="a head or by a critic of its own: give one of them"):
            ActorCritic(policy, **both)
    other = random_scalar(replace(NETWORK, vocab_size=40), key=jax.random.key(0))
    with pytest.raises(ValueError, match="a critic of 40 token ids cannot read the policy's 32"):
        ActorCritic(policy, critic=other)
