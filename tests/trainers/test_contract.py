"""What every trainer keeps to, whatever it learns from: one suite over all of them."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from models.llama import load_tokenizer
from tests.trainers.contract import LORA, MAKERS, difference, flags_of, opened, stepped
from tests.trainers.runs import argv, go, metrics, numbers, same
from trainers.metrics import Throughput
from utils.ahead_of_time import AHEAD_OF_TIME

COMMANDS = sorted(MAKERS)
WITH_AND_WITHOUT = pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
# What all write, and what one cannot be read without.
COMMON = {"loss", "weight", "grad_norm", "learning_rate", "skipped", "step"}
OWN = {
    "pretrain": {"nll", "accuracy", "perplexity"},
    "sft": {"nll", "accuracy", "perplexity"},
    "dpo": {
        *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
        *("logps/chosen", "logps/rejected"),
    },
    "reward": {"accuracy", "margin", "rewards/chosen", "rewards/rejected"},
    "ppo": {
        *("objective/kl", "objective/entropy", "objective/scores", "objective/rlhf_reward"),
        *("objective/non_score_reward", "policy/approxkl_avg", "policy/clipfrac_avg", "value/clipfrac_avg"),
    },
    "grpo": {"reward", "reward_std", "entropy", "completions/mean_length"},
    "distill": {"divergence", "nll", "accuracy", "perplexity"},
}


@WITH_AND_WITHOUT
@pytest.mark.parametrize("command", COMMANDS)
def test_micro_batches_change_no_number(command, lora, tmp_path):
    flags = flags_of(command, tmp_path, lora=lora)
    found = difference(*(stepped(command, flags | {"trainer.accumulation_steps": n}) for n in ("1", "4")))
    assert found["metrics"] < 2e-5 and found["parameters"] < 2e-5, found
    assert found["grad_norm"] > 1e-3, "nothing was learnt, so there is nothing to compare"


@pytest.mark.parametrize(
    ("shapes", "lora"),
    [
        ([(2, 2, 2, 1)], False),
        pytest.param([(2, 2, 2, 1)], True, marks=pytest.mark.slow),
        pytest.param([(8, 1, 1, 1), (1, 8, 1, 1), (1, 2, 2, 2)], False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_eight_devices_give_the_numbers_of_one(repo_root, shapes, lora, tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", "tests.trainers.contract", str(tmp_path)]
    command += map(json.dumps, (shapes, COMMANDS, lora))
    done = subprocess.run(command, cwd=repo_root, env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert sorted(found) == COMMANDS
    for name, sides in found.items():
        for side in sides:
            assert side["metrics"] < 2e-5 and side["parameters"] < 2e-5 and side["grad_norm"] > 1e-3, (name, side)


@WITH_AND_WITHOUT
@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(command, lora, tmp_path):
    flags = MAKERS[command](tmp_path) | {"trainer.steps": "5", "trainer.eval_every": "3", "checkpoint.every_steps": "3"}
    flags |= LORA if lora else {}
    whole, cut = ({**flags, "output_dir": str(tmp_path / name)} for name in ("whole", "cut"))
    expected = go(command, whole)
    go(command, cut, stop_at=2)
    state = go(command, cut, resume=True)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert same(state, expected) and int(state.step) == 5


@WITH_AND_WITHOUT
@pytest.mark.parametrize("command", COMMANDS)
def test_metrics_are_there_and_finite(command, lora, tmp_path):
    go(command, MAKERS[command](tmp_path) | {"trainer.steps": "2", "trainer.eval_every": "2", **(LORA if lora else {})})
    rows = metrics(tmp_path / "run")
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2]
    for row in trained:
        assert COMMON | OWN[command] <= set(row)
        assert all(np.isfinite(row[name]) for name in COMMON | OWN[command]) and row["skipped"] == 0
    assert any("validation/loss" in row for row in rows)


@pytest.mark.parametrize("command", COMMANDS)
def test_adapters_alone_are_trained(command, tmp_path):
    run = opened(command, flags_of(command, tmp_path, lora=True))
    before = {path: np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(run.model)}
    state = run.trainer.init(run.model, jax.random.key(0))
    state = run.trainer.fit(state, run.course.data, num_steps=2)
    changed = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.model)
        if not np.array_equal(before[path], leaf)
    }
    assert any(".adapters" in name for name in changed)
    heads = {name for name in changed if name.startswith((".score_D", ".value_D"))}
    assert bool(heads) == (command in ("reward", "ppo"))
    assert all(".adapters" in name for name in changed - heads), changed


@pytest.mark.parametrize("command", COMMANDS)
def test_a_batch_that_cannot_be_cut_is_refused_and_one_of_nothing_changes_nothing(command, tmp_path):
    run = opened(command, flags_of(command, tmp_path) | {"trainer.accumulation_steps": "4"})
    state = run.trainer.init(run.model, jax.random.key(0))
    batch, _ = run.trainer.prepare(state, run.course.data, Throughput())
    rows, shared = (batch.rows, batch.shared) if hasattr(batch, "shared") else (batch, None)

    def again(rows):
        return rows if shared is None else type(batch)(rows, shared)

    with pytest.raises(ValueError, match="cannot be cut evenly into 4 micro-batches"):
        run.trainer.step(state, again(jax.tree.map(lambda x: x[:6], rows)))
    weights = [name for name in vars(rows) if name in ("weights_BT", "weights_B", "mask_BCM", "rollout_tokens_BC")]
    nothing = type(rows)(**vars(rows) | {name: np.zeros_like(vars(rows)[name]) for name in weights})
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(state.model)]
    state, found = run.trainer.step(state, again(nothing))
    after = [np.asarray(leaf) for leaf in jax.tree.leaves(state.model)]
    assert int(found["skipped"]) == 1 and all(map(np.array_equal, before, after))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["dpo", "reward", "ppo", "distill"])
def test_a_step_compiles_for_a_tpu_slice(command, repo_root, tmp_path):
    """With what goes along: a reference's numbers, a critic, a teacher. By splash attention where there are prompts."""
    pytest.importorskip("libtpu")
    flags = flags_of(command, tmp_path)
    words = load_tokenizer(flags["tokenizer"]).vocab_size if command == "distill" else 64
    flags["model.changes"] = (
        "{num_layers: 2, hidden_size: 256, intermediate_size: 512, num_heads: 4, num_kv_heads: 4, head_dim: 64, "
        f"max_position_embeddings: 512, vocab_size: {words}}}"
    )
    lengths = ("data.max_prompt_length", "data.max_completion_length", "rollout.max_completion_length")
    flags |= {key: "128" for key in lengths if key in flags} | {"mesh.data": "1", "mesh.fsdp": "4"}
    program = [sys.executable, "train.py", command, *argv(flags), "--compile_only", "--topology=v5e:2x2"]
    done = subprocess.run(program, cwd=repo_root, env=os.environ | AHEAD_OF_TIME, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "MFU" in done.stdout and ("splash_mha" in done.stdout) == (command != "distill")


def test_every_command_is_under_the_contract():
    import train

    assert set(COMMANDS) == set(train.COMMANDS) - {"export"} == set(OWN)
