"""PPO over eight devices, rollouts and all, against one: in a process of its own, forced to have them."""

import json
import os
import subprocess
import sys

import pytest

SIDES = """
import json, sys
from dataclasses import replace
import jax, jax.numpy as jnp, numpy as np, optax
from data.prompts import Prompt
from inference.rollout import sampler
from models.llama import PRESETS, random_scalar
from models.llama.init import random_model
from trainers.actor_critic import ActorCritic
from trainers.ppo_experience import PPOExperience, PPOExperienceConfig
from trainers.ppo_losses import PPOLossConfig
from trainers.ppo_trainer import PPOTrainer
from trainers.rewards import Reward
from trainers.rollouts import RolloutConfig
from utils.sharding import make_mesh, named_sharding

V, P, C, M, STEPS, STOP = 40, 8, 4, 12, 6, 7
NETWORK = replace(
    PRESETS["tiny"], num_layers=2, hidden_size=16, intermediate_size=24, num_heads=4, num_kv_heads=2, head_dim=8,
    vocab_size=V, layer_windows=(None, 6), initializer_range=0.3,
)

def prompts():
    draw = np.random.default_rng(0)
    ids = [tuple(draw.integers(8, V, 3 + 2 * n).tolist()) for n in range(P)]
    rows = [Prompt(ids=own, prompt="", columns={}, index=n) for n, own in enumerate(ids)]
    return iter([rows] * STEPS)

def small(completion_ids, **_):
    return [float(np.mean(np.array(ids) < V // 2)) for ids in completion_ids]

def network(shape, kind):
    mesh = None if shape is None else make_mesh(shape)
    policy = random_model(NETWORK, key=jax.random.key(3), mesh=mesh)
    if kind == "separate":
        return ActorCritic(policy, critic=random_scalar(NETWORK, key=jax.random.key(4), mesh=mesh))
    head_D = jnp.linspace(-1, 1, 16, dtype=jnp.float32)
    if mesh is not None:
        head_D = jax.device_put(head_D, named_sharding("D", (16,), mesh))
    return ActorCritic(policy, value_D=head_D)

def run(shape, kind):
    model, devices = network(shape, kind), 1 if shape is None else shape[0] * shape[1]
    rollout = RolloutConfig(max_completion_length=M, completions=C, temperature=0.9)
    draws = sampler(
        max_new_tokens=M, num_samples=C, temperature=0.9, top_k=None, top_p=1.0, min_p=0.0,
        stop_ids=frozenset({STOP}), seed=1,
    )
    experience = PPOExperience(
        draws, [Reward("small", small)], str, rollout=rollout, config=PPOExperienceConfig(epochs=2, mini_batches=2),
        reference=jax.tree.map(lambda x: x.copy(), model.policy), micro_batches=2, rows=2 * devices,
    )
    # Adam divides small gradients by small numbers: an eps that does not blow rounding up.
    trainer = PPOTrainer(
        optax.adam(1e-2, eps=1e-3), PPOLossConfig(vf_coef=0.5), rollout=rollout, experience=experience,
        accumulation_steps=2,
    )
    state, drawn, losses = trainer.init(model, jax.random.key(0)), [], []
    names = ("loss", "grad_norm", "reward", "objective/kl", "objective/entropy", "policy/approxkl_avg", "value/mean")
    def observe(step, state, metrics):
        losses.append([float(metrics[name]) for name in names])
        drawn.append([group.tokens_CM.tolist() for group in experience.groups])
    state = trainer.fit(state, prompts(), num_steps=STEPS, observers=[observe])
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state.model)], drawn, losses

said = {}
for kind, *shape in json.loads(sys.argv[1]):
    one, drawn, losses = run(None, kind)
    eight, own_drawn, own_losses = run(tuple(shape), kind)
    begun = jax.tree.leaves(network(None, kind))
    said[kind + str(shape)] = dict(
        same=drawn == own_drawn,
        losses=float(np.max(np.abs(np.array(own_losses) - np.array(losses)))),
        parameters=max(float(np.max(np.abs(a - b))) for a, b in zip(one, eight, strict=True)),
        moved=max(float(np.max(np.abs(a - np.asarray(b)))) for a, b in zip(one, begun, strict=True)),
        kl=losses[-1][3],
    )
print(json.dumps(said))
"""


@pytest.mark.parametrize(
    "sides",
    [
        [("separate", 2, 2, 2, 1)],
        pytest.param([("head", 2, 2, 2, 1), ("head", 1, 2, 2, 2), ("separate", 8, 1, 1, 1)], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_completions_losses_and_updates_on_eight_devices_are_those_on_one(repo_root, sides):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(repo_root)}
    command = [sys.executable, "-c", SIDES, json.dumps(sides)]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(sides)
    for name, side in found.items():
        assert side["same"], f"other completions on {name}"
        assert side["moved"] > 1e-2 and abs(side["kl"]) > 1e-4  # it did learn
        assert side["losses"] < 2e-5 and side["parameters"] < 2e-5, (name, side)
