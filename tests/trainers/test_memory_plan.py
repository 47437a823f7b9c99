"""From a run's settings to its memory: the same shapes as the run's own, the table, and what the compiler says."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from models.llama import PRESETS, LoraConfig, add_lora
from models.llama.init import random_model
from tests.trainers.runs import RECIPES, ppo, pretraining, reinforcing, tuning
from trainers import memory_plan
from trainers.optimizers import OptimizerConfig, make_optimizer
from trainers.run import prepare
from trainers.sft_trainer import SFTTrainer
from utils import memory
from utils.chips import chip_of
from utils.settings import load_settings
from utils.sharding import make_mesh

NETWORK = dataclasses.replace(PRESETS["tiny"], num_layers=2, layer_windows=(None, None))
MAKERS = {"pretrain": pretraining, "sft": tuning, "grpo": reinforcing}


def alike(a, b) -> bool:
    return all(
        x.shape == y.shape and x.dtype == y.dtype and x.sharding.is_equivalent_to(y.sharding, x.ndim)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_shapes_are_those_of_a_state_on_the_mesh(rank, optimizer):
    mesh, key = make_mesh((1, 1, 1, 1)), jax.random.key(0)
    lora = None if rank is None else LoraConfig(rank=rank, alpha=8.0)
    model = random_model(NETWORK, key=key, mesh=mesh, dtype=jnp.bfloat16)
    model = model if lora is None else add_lora(model, lora, key=key)
    made = make_optimizer(OptimizerConfig(name=optimizer), learning_rate=1e-3, num_steps=10).transformation
    trainable = nnx.Param if lora is None else nnx.LoRAParam
    abstract = memory_plan.abstract_model(NETWORK, mesh, dtype=jnp.bfloat16, lora=lora)
    assert alike(abstract, model)
    state = SFTTrainer(made, trainable=trainable).abstract_init(abstract)
    assert alike(state, SFTTrainer(made, trainable=trainable).init(model, key))


def settings(command: str, folder: Path, **changes: str):
    flags = MAKERS[command](folder, **changes)
    return load_settings(RECIPES[command].config, None, [f"--{key}={value}" for key, value in flags.items()])


@pytest.mark.parametrize("command", MAKERS)
def test_a_run_begins_with_the_table(command, tmp_path):
    said: list[str] = []
    config = settings(command, tmp_path)
    run = prepare(command, RECIPES[command], config, resume=False, cache_dir=tmp_path, say=said.append)
    step = RECIPES[command].memory_step(config, run.model.config, run.mesh)
    assert said == memory_plan.report(step, run.mesh)
    assert said[0].startswith("memory of a device, ")
    parts = [line.split("  ")[0] for line in said]
    assert {"parameters", "optimizer", "kept activations", "together"} <= set(parts)
    assert ("keys and values" in parts) == (command == "grpo")
    assert "the largest batch that fits has" in said[-1]
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(run.model))
    assert step.held.parameters == trained
    assert trained * 2 <= step.held.optimizer < trained * 2 + 100
    if command != "grpo":
        batch = memory_plan.abstract_batch(config, run.mesh)
        counted = memory.estimate(step).moments["loss"]["batch"]
        assert counted == sum(leaf.size * 4 for leaf in jax.tree.leaves(batch)) > 0


def test_adapters_alone_have_optimizer_state(tmp_path):
    whole, adapted = (
        RECIPES["sft"].memory_step(settings("sft", tmp_path, **lora), NETWORK, make_mesh((1, 1, 1, 1)))
        for lora in ({}, {"lora": "{rank: 2, alpha: 4}"})
    )
    assert adapted.held.parameters > whole.held.parameters
    assert adapted.held.optimizer < whole.held.optimizer / 4
    assert adapted.held.gradients < whole.held.gradients / 4
    assert not adapted.trains_all and whole.trains_all


def test_a_separate_critic_has_activations_of_its_own(tmp_path):
    head, separate = (
        RECIPES["ppo"].memory_step(
            load_settings(RECIPES["ppo"].config, None, ppo(tmp_path, **{"critic.kind": kind})),
            NETWORK,
            make_mesh((1, 1, 1, 1)),
        )
        for kind in ("head", "separate")
    )
    assert memory.kept(separate) == 2 * memory.kept(head) > 0
    assert separate.held.parameters > 1.5 * head.held.parameters


def test_a_batch_that_does_not_fit_is_warned_of(tmp_path, monkeypatch):
    config, mesh = settings("sft", tmp_path), make_mesh((1, 1, 1, 1))
    step = RECIPES["sft"].memory_step(config, NETWORK, mesh)
    peak = memory.estimate(step).peak
    monkeypatch.setattr(memory_plan, "capacity", lambda mesh: peak)
    assert "warning" not in memory_plan.report(step, mesh)[-1]
    monkeypatch.setattr(memory_plan, "capacity", lambda mesh: peak - 1)
    *_, fits, warning = memory_plan.report(step, mesh)
    rows = config.trainer.batch_size
    assert warning.startswith("warning: ") and f"{rows} rows do not fit" in warning
    assert f"has {rows - config.trainer.accumulation_steps} rows" in fits
    monkeypatch.setattr(memory_plan, "capacity", lambda mesh: 1000)
    assert "not even a batch of" in memory_plan.report(step, mesh)[-2]


def test_devices_of_a_cpu_share_the_machine():
    capacity = memory_plan.capacity(make_mesh((1, 1, 1, 1)))
    assert 2**28 < capacity <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.slow
def test_the_estimate_is_the_compilers_within_a_tenth(repo_root, tmp_path):
    """For TPU slices, of both models, all kinds of meshes, and a case that does not fit."""
    pytest.importorskip("libtpu")
    small, large = dict(preset="llama-3.2-1b"), dict(preset="llama-3.1-8b")
    cases = [
        small | dict(topology="v5e:2x2", mesh=[1, 4, 1, 1], rows=4, length=2048, remat="dots"),
        small | dict(topology="v6e:2x2", mesh=[1, 1, 2, 2], rows=4, length=4096, remat="block", pieces=2),
        small | dict(topology="v5e:2x2", mesh=[1, 4, 1, 1], rows=16, length=4096, remat="none"),
        large | dict(topology="v6e:4x4", mesh=[2, 4, 2, 1], rows=16, length=4096, remat="block"),
    ]
    given, found = tmp_path / "cases.jsonl", tmp_path / "found.jsonl"
    given.write_text("".join(json.dumps(case) + "\n" for case in cases))
    command = [sys.executable, "-m", "benchmarks.memory", "--cases", str(given), "--output", str(found)]
    result = subprocess.run(command, cwd=repo_root, env=os.environ.copy(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    results = [json.loads(line) for line in found.read_text().splitlines()]
    assert [own["fits"] for own in results] == [True, True, False, True]
    for own in results:
        usable, estimate = chip_of(own["topology"].partition(":")[0]).usable_bytes, own["estimate"]["peak"]
        assert (estimate <= usable) == own["fits"], own
        if own["fits"]:
            assert estimate == pytest.approx(own["compiler"]["total"], rel=0.1), own
    assert isinstance(memory.Estimate(moments=results[0]["estimate"]["moments"]).peak, int)
