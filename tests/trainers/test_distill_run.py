"""Runs of distillation: resumed they are those that were never interrupted; what they learn from; what is refused."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
import yaml

from data.prompts import Prompt
from models.llama import PRESETS, LLaMa, load_config, load_pretrained, load_tokenizer, save_pretrained
from tests.trainers.runs import RECIPES, distilling, go, metrics, numbers, same
from trainers import parts
from trainers.checkpoints import Checkpointer
from trainers.distill_settings import DistillRunConfig, OnPolicyConfig
from trainers.distill_trainer import DistillTrainer
from trainers.distillation import DistillConfig
from trainers.export import restore_model
from trainers.flops import attention_flops, document_lengths, matrix_flops, training_flops
from trainers.metrics import Throughput
from trainers.own_samples import OwnSamples, rows_of
from trainers.run import prepare
from utils.settings import describe, from_dict, load_settings

RECIPE = RECIPES["distill"]
LORA = {"lora.rank": "2", "lora.alpha": "4"}
SHORT = {"trainer.steps": "2", "trainer.eval_every": "2", "checkpoint.every_steps": "2"}


def prepared(flags: dict[str, str]):
    config = load_settings(DistillRunConfig, None, flags)
    return prepare("distill", RECIPE, config, resume=False, cache_dir="not used")


# Resuming.


@pytest.mark.parametrize(
    ("on_policy", "changes"),
    [(False, {}), (True, {}), pytest.param(True, LORA | {"loss.hard_weight": "0.5"}, marks=pytest.mark.slow)],
    ids=["data", "on-policy", "lora"],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path, on_policy, changes):
    flags = distilling(tmp_path, on_policy=on_policy, **changes)
    whole, cut = ({**flags, "output_dir": str(tmp_path / name)} for name in ("whole", "cut"))
    expected = go("distill", whole)
    assert int(go("distill", cut, stop_at=7).step) == 7  # between two evaluations and two regular saves
    state = go("distill", cut, resume=True)

    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert same(state, expected)
    held = [carried(tmp_path / name, 14) for name in ("whole", "cut")]
    assert held[0] == held[1]
    rows = [row for row in metrics(tmp_path / "whole") if "loss" in row]
    own = [row["step"] for row in rows if "on_policy" in row]
    assert (4 < len(own) < 11) == on_policy and bool(own) == on_policy
    of_own = {"completions/mean_length", "completions/clipped_ratio", "time/rollout"}
    assert all(of_own <= row.keys() for row in rows if "on_policy" in row)
    assert held[0]["loader"]["batches"] == 14 - len(own), "steps on-policy leave the data where they are"
    if on_policy:
        assert held[0]["prompts"]["prompts"] == [2 * len(own)]


def carried(folder: Path, step: int) -> dict:
    info = json.loads((folder / "checkpoints" / str(step) / "info" / "data.json").read_text())
    return info["data_states"][0]


def test_the_steps_that_are_on_policy_follow_from_the_seed_and_the_step_alone():
    def chosen(share, seed):
        samples = OwnSamples(None, iter(()), share=share, seed=seed, max_length=8)
        return [samples.wanted(step) for step in range(400)]

    assert chosen(0.25, 0) == chosen(0.25, 0) != chosen(0.25, 1)
    assert 70 < sum(chosen(0.25, 0)) < 130 and all(chosen(1.0, 3))


# The teacher.


def test_the_teacher_stays_as_it_is_and_is_in_no_checkpoint(tmp_path: Path):
    flags = distilling(tmp_path, on_policy=True, **SHORT)
    run = prepared(flags)
    before = load_pretrained(tmp_path / "teacher")
    state = go("distill", flags)
    assert same(run.trainer.teacher, before) and same(load_pretrained(tmp_path / "teacher"), before)
    shutil.rmtree(tmp_path / "teacher")
    networks, *_ = restore_model(RECIPES, tmp_path / "run", None)
    assert same(networks["hf"], state.model)


def test_adapters_alone_are_trained(tmp_path: Path):
    flags = distilling(tmp_path, **SHORT, **LORA)
    run = prepared(flags)
    before, after = (jax.tree_util.tree_leaves_with_path(own) for own in (run.model, go("distill", flags).model))
    changed = {jax.tree_util.keystr(path) for (path, old), (_, new) in zip(before, after) if not same(old, new)}
    assert changed and all("adapters" in name for name in changed)


def test_the_teacher_counts_as_memory_and_as_work(tmp_path: Path):
    config = load_settings(DistillRunConfig, None, distilling(tmp_path, on_policy=True))
    mesh, teacher = parts.make_mesh(config.mesh), load_pretrained(tmp_path / "teacher")
    llama = parts.network_config(config.model, load_tokenizer(tmp_path / "characters"))
    step = RECIPE.memory_step(config, llama, mesh)
    assert step.others == sum(leaf.nbytes for leaf in jax.tree.leaves(teacher))
    assert step.rollout.rows == 4 and step.length == 32
    run = prepared(distilling(tmp_path))
    seen = SimpleNamespace(add_step=lambda **counts: setattr(seen, "counts", counts))
    batch = next(iter(run.course.counted(run.course.data, seen)))

    lengths = document_lengths(batch.segments_BT)
    forward = lengths.sum() * matrix_flops(teacher.config) + attention_flops(teacher.config, lengths)
    assert seen.counts == {"tokens": lengths.sum(), "flops": training_flops(llama, lengths) + forward}


def test_the_largest_batch_is_what_a_step_takes(tmp_path: Path):
    """As it is compiled for other devices: on-policy rows may be longer than those of the data."""
    flags = distilling(tmp_path, on_policy=True, **{"data.sequence_length": "16", "data.packing": "concat"})
    config = load_settings(DistillRunConfig, None, flags)
    mesh = parts.make_mesh(config.mesh)
    llama = parts.network_config(config.model, load_tokenizer(tmp_path / "characters"))
    full = RECIPE.full_batch(config, llama, mesh)
    assert full.lengths == (22,) * 4 and full.batch.rows.tokens_BT.shape == (4, 22)
    trainer = RECIPE.make_trainer(config, 10)
    state = trainer.abstract_init(RECIPE.abstract_model(config, llama, mesh))
    jax.eval_shape(trainer.step, state, full.batch)


# What is learnt.


def test_the_loss_is_that_of_whole_logits(tmp_path: Path):
    """Of packed rows, whose documents neither network may see across."""
    run = prepared(distilling(tmp_path, **{"data.validation_fraction": "0.1"}))
    rows, student, teacher = next(run.course.data), run.model, run.trainer.teacher
    assert rows.segments_BT.max() > 1
    config = DistillConfig(kind="reverse_kl", temperature=2.0, hard_weight=0.25)
    trainer = DistillTrainer(optax.sgd(0.1), config, teacher=teacher)
    loss = trainer.loss(student, trainer.with_teacher(rows), None)
    sums = np.zeros(2)
    forward = [jax.jit(lambda tokens_BT, own=own: own(tokens_BT)[0][0]) for own in (student, teacher)]
    for b, t in zip(*np.nonzero(rows.weights_BT)):
        place = rows.positions_BT[b, t]
        alone_BT = np.zeros((1, 32), np.int32)
        alone_BT[0, : place + 1] = rows.tokens_BT[b, t - place : t + 1]
        logits = [np.asarray(own(alone_BT)[place]) for own in forward]
        log_q, log_p = (log_softmax(own / 2) for own in logits)
        divergence = np.exp(log_q) @ (log_q - log_p)
        nll = -log_softmax(logits[0])[rows.targets_BT[b, t]]
        sums += rows.weights_BT[b, t] * np.array([0.75 * 4 * divergence + 0.25 * nll, divergence])
    assert float(loss.sum) == pytest.approx(sums[0], rel=1e-4)
    assert float(loss.metrics["divergence"][0]) == pytest.approx(sums[1], rel=1e-4)
    assert float(loss.weight) == rows.weights_BT.sum()


def log_softmax(logit_V: np.ndarray) -> np.ndarray:
    logit_V = logit_V.astype(np.float64)
    return logit_V - np.log(np.exp(logit_V).sum())


@pytest.mark.parametrize("learn", ["answers", "all"])
def test_prompts_are_learnt_only_where_one_wants_it(tmp_path: Path, learn):
    batch = next(prepared(distilling(tmp_path, learn=learn)).course.data)
    places, learnt = (batch.segments_BT > 0).sum(), batch.weights_BT.sum()
    assert learnt == places if learn == "all" else 0 < learnt < 0.7 * places


def test_validation_is_of_the_student_and_best_checkpoints_may_go_by_its_nll(tmp_path: Path):
    flags = distilling(tmp_path, **{"checkpoint.metric": "validation/nll", "trainer.steps": "4"})
    go("distill", flags)
    rows = [row for row in metrics(tmp_path / "run") if "validation/loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        assert row["validation/perplexity"] == pytest.approx(np.exp(row["validation/nll"]))
        assert row["validation/loss"] == pytest.approx(row["validation/divergence"], rel=1e-6)
    assert Checkpointer(tmp_path / "run" / "checkpoints").latest() == 4


def test_a_student_comes_near_its_teacher(tmp_path: Path):
    flags = distilling(tmp_path, **{"trainer.steps": "60", "trainer.eval_every": "60", "trainer.learning_rate": "1e-2"})
    flags |= {"trainer.eval_at_start": "true", "checkpoint.every_steps": "60", "trainer.log_every": "60"}
    go("distill", flags | {"loss.dropout": "0"})
    first, *_, last = (row for row in metrics(tmp_path / "run") if "validation/divergence" in row)
    assert last["validation/divergence"] < 0.75 * first["validation/divergence"]


def test_completions_become_rows_behind_their_prompts():
    prompts = [Prompt(ids=ids, prompt="", columns={}, index=0) for ids in ((5, 6, 7), (8,))]
    rollout = SimpleNamespace(
        tokens_BM=np.array([[1, 2, 0], [3, 0, 0], [1, 2, 3], [4, 0, 0]], np.int32), count_B=np.array([2, 1, 3, 1])
    )
    batch = rows_of(prompts, rollout, max_length=6)
    assert batch.tokens_BT.shape == (4, 6) and rows_of(prompts, rollout, max_length=99).tokens_BT.shape == (4, 16)
    np.testing.assert_array_equal(batch.tokens_BT[0], [5, 6, 7, 1, 0, 0])
    np.testing.assert_array_equal(batch.targets_BT[0], [6, 7, 1, 2, 0, 0])
    np.testing.assert_array_equal(
        batch.weights_BT, [[0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0], [1] * 3 + [0] * 3, [1] + [0] * 5]
    )
    np.testing.assert_array_equal(batch.segments_BT[2], [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(batch.positions_BT[2], [0, 1, 2, 0, 0, 0])
    np.testing.assert_array_equal(batch.tokens_BT[2], [8, 1, 2, 0, 0, 0])


def test_a_failing_rollout_gives_its_prompts_back(tmp_path: Path):
    run = prepared(distilling(tmp_path, on_policy=True))
    prompts = run.course.carried["prompts"]
    before = prompts.state()

    def fail(*_):
        raise MemoryError("no room")

    samples = OwnSamples(fail, prompts, share=1.0, seed=0, max_length=22)
    with pytest.raises(MemoryError, match="no room"):
        samples.draw(run.model, 0, Throughput())
    assert prompts.state() == before


# What is refused before anything begins.


def another_tokenizer(folder: Path) -> None:
    path = folder / "teacher" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"loss.kind": "kl"}, "'kl'"),
        ({"loss.beta": "0.3"}, "beta 0.3 is for kind jsd, not for forward_kl"),
        ({"loss.temperature": "0"}, "temperature must be above 0 and finite, not 0"),
        ({"loss.hard_weight": "2"}, "hard_weight 2.0 must be from 0 to 1"),
        ({"loss.dropout": "1"}, "dropout 1.0 must be at least 0 and below 1"),
        ({"teacher.checkpoint": "no/such"}, "no/such"),
        ({"teacher.checkpoint": ""}, "checkpoint is empty"),
        ({"teacher.dtype": "float16"}, "float16"),
        ({"model.changes.vocab_size": "30"}, "vocabulary of 20 tokens, the student one of 30"),
        ({"data.sequence_length": "33"}, "sequence_length 33 is longer than the model's context of 32"),
        (
            {"data.sequence_length": "40", "model.changes.max_position_embeddings": "64"},
            "sequence_length 40 is longer than the teacher's context of 32",
        ),
        ({"tokenizer": "characters"}, "tokenizer characters is made anew"),
        ({"on_policy.share": "0"}, "share 0.0 must be above 0 and at most 1"),
        ({"on_policy.rollout.completions": "3"}, "batch_size 4 is not a multiple of on_policy.rollout.completions 3"),
        (
            {"on_policy.rollout.max_completion_length": "17"},
            "max_completion_length 17 are together longer than",
        ),
        ({"on_policy.prompts.validation_fraction": "0.1"}, "data is validated on"),
        ({"on_policy.prompts.train": "no/such.jsonl"}, "no/such.jsonl"),
        ({"checkpoint.metric": "validation/reward"}, "'validation/reward' is none of a validation's"),
    ],
)
def test_what_does_not_fit_together_is_one_line(tmp_path: Path, changes, error):
    with pytest.raises((ValueError, OSError), match=error) as found:
        prepared(distilling(tmp_path, on_policy=True) | changes)
    assert "\n" not in str(found.value) and not (tmp_path / "run").exists()


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path: Path):
    flags = distilling(tmp_path)
    another_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"teacher.checkpoint .* has another tokenizer than the run"):
        prepared(flags)
    (tmp_path / "teacher" / "tokenizer.json").unlink()  # then it is taken to be the run's
    prepared(flags)


def test_drawing_in_several_processes_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    flags = distilling(tmp_path, on_policy=True)
    config = load_settings(DistillRunConfig, None, flags)
    tokenizer = load_tokenizer(tmp_path / "characters")
    with pytest.raises(ValueError, match="on_policy draws in one process, of any number of devices, not in 2"):
        RECIPE.open(
            config,
            tokenizer=tokenizer,
            tokenizer_path=tmp_path / "characters",
            llama=load_config(tmp_path / "teacher"),
            mesh=parts.make_mesh(config.mesh),
            cache_dir=tmp_path,
        )


ON_A_MESH = """
import dataclasses, sys
import jax, numpy as np, optax
from models.llama.init import random_model
from tests.mesh_sides import NETWORKS, packed
from trainers.distill_trainer import DistillTrainer
from trainers.distillation import DistillConfig
from utils.sharding import make_mesh

wide = dataclasses.replace(NETWORKS["gqa-untied"], hidden_size=48)

def trained(mesh):
    student, teacher = (random_model(own, key=jax.random.key(1), mesh=mesh) for own in (NETWORKS["gqa"], wide))
    trainer = DistillTrainer(optax.sgd(0.125), DistillConfig(kind="jsd", temperature=2.0, hard_weight=0.2),
        teacher=teacher, accumulation_steps=2, max_grad_norm=None)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(student)]
    state, losses = trainer.init(student, jax.random.key(0)), []
    batches = [packed(72, seed) for seed in range(2)]
    state = trainer.fit(state, batches, num_steps=2, observers=[lambda step, state, m: losses.append(float(m["loss"]))])
    losses.append(trainer.evaluate(state.model, map(trainer.with_teacher, batches))["divergence"])
    return losses, [(np.asarray(a) - b) / 0.125 for a, b in zip(jax.tree.leaves(state.model), before)]

one_losses, one = trained(None)
for shape in [(2, 2, 2, 1), (1, 2, 2, 2)]:
    losses, moved = trained(make_mesh(shape))
    np.testing.assert_allclose(losses, one_losses, atol=1e-5)
    for a, b in zip(moved, one, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
assert max(np.abs(own).max() for own in one) > 0.02
print("same")
"""


def test_eight_devices_give_the_steps_of_one(repo_root: Path):
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(repo_root)}
    done = subprocess.run([sys.executable, "-c", ON_A_MESH], env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["same"]


def test_on_policy_steps_may_begin_when_a_run_is_resumed(tmp_path: Path):
    flags = distilling(tmp_path, on_policy=True)
    before = {key: value for key, value in flags.items() if not key.startswith("on_policy")}
    go("distill", before, stop_at=2)
    said: list[str] = []
    state = go("distill", flags | {"trainer.steps": "5"}, resume=True, said=said)
    assert int(state.step) == 5 and "the checkpoint holds no prompts: that begins anew" in said


# The page for users.


def test_the_example_of_the_page_runs(tmp_path: Path, repo_root: Path, monkeypatch, capsys):
    page = (repo_root / "docs" / "distillation.md").read_text()
    [source] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    network = dataclasses.replace(PRESETS["tiny"], num_layers=1, layer_windows=(None,), initializer_range=0.2)
    save_pretrained(LLaMa(network, key=jax.random.key(0)), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    exec(compile(source.replace("_steps=10", "_steps=3"), "distillation.md", "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2", "3"]


def test_the_settings_of_the_page_are_there(repo_root: Path):
    page = (repo_root / "docs" / "distillation.md").read_text()
    named = set(re.findall(r"`((?:loss|teacher|trainer|model|data)\.\w+)`", page))
    known = describe(DistillRunConfig)
    assert len(named) > 8 and not [name for name in sorted(named) if name not in known]
    config = yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.DOTALL).group(1))
    from_dict(OnPolicyConfig, config["on_policy"])
