"""Runs of PPO as a whole: resumed wherever they stood, they are the runs that were never interrupted."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from models.llama import HeadParam, load_pretrained, load_scalar, random_scalar, save_scalar
from tests.trainers.runs import RECIPES, argv, completions, go, metrics, numbers, ppo, same, share_of_a
from tests.trainers.test_grpo_run import program  # noqa: F401
from trainers.checkpoints import Checkpointer
from trainers.export import restore_model
from trainers.metrics import Throughput
from trainers.parts import network_config
from trainers.run import prepare
from utils.settings import describe, load_settings

LORA = {"lora.rank": "2", "lora.alpha": "4"}
SEPARATE = {"critic.kind": "separate"}
PENALTIES = {"experience.missing_eos_penalty": "0.5", "experience.whiten_rewards": "true"}


# Resuming.


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        # In the first round of a rollout, and in its second one.
        pytest.param({"trainer.steps": "7", "trainer.accumulation_steps": "2"}, (1, 2), id="head"),
        pytest.param({"trainer.steps": "6", **SEPARATE, **LORA}, (3,), id="separate-lora"),
        pytest.param({**PENALTIES, "rollout.completions": "1"}, (2, 1, 1, 3), id="head-often", marks=pytest.mark.slow),
        pytest.param({**SEPARATE, **PENALTIES}, (5,), id="separate", marks=pytest.mark.slow),
        pytest.param({**LORA, "experience.kl_coef": "0"}, (4, 3), id="head-lora", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path, changes, stops):
    flags = ppo(tmp_path, **changes, **{"log.completions_every": "1"})
    whole, cut = ({**flags, "output_dir": str(tmp_path / name)} for name in ("whole", "cut"))
    steps, done = int(flags["trainer.steps"]), 0
    expected = go("ppo", whole)
    for stop in stops:
        done += stop
        assert int(go("ppo", cut, resume=done > stop, stop_at=stop).step) == done
    assert same(go("ppo", cut, resume=True), expected)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    rows = [row for row in metrics(tmp_path / "cut") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert completions(tmp_path / "cut") == completions(tmp_path / "whole")
    assert {row["step"] for row in completions(tmp_path / "cut")} == set(range(1, steps + 1, 4))
    assert max(row["sampler_logprob_diff"] for row in rows) < 1e-5
    if "experience.kl_coef" not in changes:
        assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
        assert abs(rows[-1]["objective/kl"]) > 1e-5  # from what it was, not from itself


def test_what_is_trained_under_lora_are_adapters_and_heads(tmp_path: Path):
    config = load_settings(RECIPES["ppo"].config, None, ppo(tmp_path, **LORA, **SEPARATE))
    run = prepare("ppo", RECIPES["ppo"], config, resume=False, cache_dir=tmp_path)
    trained = jax.tree_util.tree_leaves_with_path(nnx.state(run.model, run.trainer.trainable))
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in trained]
    heads = [name for name in names if name.startswith("critic.score_D")]
    assert len(heads) == 1 and all(".adapters." in name for name in set(names) - set(heads))
    adapters = [len([name for name in names if name.startswith(f"{part}.")]) for part in ("policy", "critic.llama")]
    assert adapters == [2 * 7, 2 * 7]
    assert not run.model.critic.score_D[...].any()
    backbones = run.model.policy.blocks, run.model.critic.llama.blocks
    assert same(*backbones) and backbones[0].q_DNH[...].any()


# Learning.


@pytest.fixture(scope="module", params=["head", pytest.param("separate", marks=pytest.mark.slow)])
def learnt(request, tmp_path_factory) -> list[dict]:
    """The metrics of a run of 96 updates, long enough to learn."""
    folder = tmp_path_factory.mktemp("learnt")
    changes = {"critic.kind": request.param, "trainer.steps": "96", "trainer.batch_size": "8", "loss.vf_coef": "0.5"}
    changes |= {"trainer.eval_every": "96", "checkpoint.every_steps": "96", "optimizer.schedule": "constant"}
    go("ppo", ppo(folder, **changes))
    return metrics(folder / "run")


def test_it_learns_what_is_rewarded_and_what_states_are_worth(learnt):
    rows = [row for row in learnt if "loss" in row]
    rewards = [row["reward"] for row in rows]
    assert np.mean(rewards[-16:]) > np.mean(rewards[:16]) + 0.2
    assert rows[-1]["objective/kl"] > 0.1 and rows[-1]["objective/rlhf_reward"] < rows[-1]["objective/scores"]
    values, returns = ([row[name] for row in rows[-16:]] for name in ("value/mean", "objective/rlhf_reward"))
    assert np.mean(values) == pytest.approx(np.mean(returns), abs=0.2)


# The page on it.


@pytest.fixture(scope="module")
def page(repo_root: Path) -> str:
    return (repo_root / "docs" / "ppo.md").read_text()


def test_metrics_of_the_page_are_those_that_are_written(page: str, learnt):
    section = page.partition("## Reading the metrics")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    written = {name.replace("rewards/a/", "rewards/NAME/") for row in learnt for name in row} - {"step"}
    memory = {name for name in named | written if name.startswith("memory/")} | {"peak_memory_bytes"}
    assert named - memory == written - memory


def test_settings_of_the_page_exist(page: str):
    settings = set(re.findall(r"^--([\w.]+):", describe(RECIPES["ppo"].config), re.MULTILINE))
    sections = {key.partition(".")[0] for key in settings}
    named = {text.partition(":")[0] for text in re.findall(r"`([^`\n]+)`", page)}
    named = {text for text in named if re.fullmatch(r"\w+(\.\w+)+", text) and text.partition(".")[0] in sections}
    named |= set(re.findall(r"--([\w.]+)=", page))
    assert len(named) > 20 and not named - settings


# Rewards that fail, and the program around them.


class Fragile:
    """A reward that fails at one of its calls, unless it has been mended."""

    def __init__(self):
        self.calls, self.fails_at = 0, None

    def __call__(self, completions, **_):
        self.calls += 1
        if self.calls == self.fails_at:
            raise ZeroDivisionError("no judge")
        return share_of_a(completions)


fragile = Fragile()


def test_a_reward_that_raises_is_one_line_and_loses_nothing(program, tmp_path: Path):  # noqa: F811
    changes = {"rewards": "[{function: 'tests.trainers.test_ppo_run:fragile', name: a}]", "trainer.steps": "6"}
    flags = ppo(tmp_path, **changes, **{"checkpoint.every_steps": "100", "trainer.eval_every": "100"})
    whole, cut = ({**flags, "output_dir": str(tmp_path / name)} for name in ("whole", "cut"))
    expected = go("ppo", whole)
    fragile.calls, fragile.fails_at = 0, 2  # in the second rollout
    code, error = program("ppo", *argv(cut))
    last = error.splitlines()[-1]
    assert code == 1 and last.startswith("train.py: reward a raised ZeroDivisionError: no judge for ")
    assert last.endswith("saved at step 4: go on with --resume")
    assert Checkpointer(tmp_path / "cut" / "checkpoints").latest() == 4
    fragile.fails_at = None
    assert same(go("ppo", cut, resume=True), expected)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


def test_policy_and_critic_are_written_and_restored(program, tmp_path: Path):  # noqa: F811
    flags = ppo(tmp_path, **SEPARATE, **{"trainer.steps": "2"})
    code, error = program("ppo", *argv(flags))
    folder = tmp_path / "run"
    assert code == 0 and {f"wrote {folder / name}" for name in ("hf", "critic")} <= set(error.splitlines())
    assert "rollouts of 4 prompts x 2 completions for 2 updates each, 2 times" in error
    networks, config, _ = restore_model(RECIPES, folder, None)
    assert same(networks["hf"], load_pretrained(folder / "hf")) and config.critic.kind == "separate"
    critic = load_scalar(folder / "critic")
    assert same(networks["critic"], critic) and critic.score_D[...].any()
    # Another run may begin with it: the values of its first step are those of this critic.
    again = {**flags, "output_dir": str(tmp_path / "again"), "critic.checkpoint": str(folder / "critic")}
    config = load_settings(RECIPES["ppo"].config, None, again)
    run = prepare("ppo", RECIPES["ppo"], config, resume=False, cache_dir=tmp_path)
    assert same(run.model.critic, critic) and not same(run.model.policy, networks["hf"])


def test_model_and_batch_without_arrays_are_those_of_a_run(tmp_path: Path):
    """What is compiled ahead of time is the step of the run, of a separate critic under adapters."""
    flags = ppo(tmp_path, **SEPARATE, **LORA)
    recipe, config = RECIPES["ppo"], load_settings(RECIPES["ppo"].config, None, flags)
    run = prepare("ppo", recipe, config, resume=False, cache_dir=tmp_path)
    model = recipe.abstract_model(config, run.model.config, run.mesh)
    assert shapes(model) == shapes(run.model)
    batch, _ = run.trainer.experience.next(run.model, run.course.data, Throughput())
    full = recipe.full_batch(config, run.model.config, run.mesh).batch
    assert shapes(full) == shapes(batch)
    run.course.data.close()


def shapes(tree) -> list:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf.shape, leaf.dtype) for path, leaf in leaves]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rewards": "[]"}, "rewards is empty: there is nothing to learn from"),
        ({"critic.kind": "none"}, "none"),
        ({"critic.checkpoint": "rm"}, "critic.checkpoint rm is for critic.kind separate, not head"),
        ({**SEPARATE, "critic.checkpoint": "no/such"}, "no/such"),
        ({**SEPARATE, "critic.checkpoint": "OTHER"}, "has 9 token ids, the policy "),
        ({"loss.value_epsilon": "0"}, "value_epsilon 0.0 must be above 0 and finite, or null"),
        ({"experience.lam": "1.5"}, "lam must be from 0 to 1, not 1.5"),
        ({"experience.mini_batches": "0"}, "mini_batches must be at least 1, not 0"),
        ({"trainer.accumulation_steps": "2", "trainer.batch_size": "3"}, "batch_size 3 is not a multiple of"),
        ({"data.max_prompt_length": "27"}, "are together longer than the model's context of 32"),
        ({"tokenizer": "characters"}, "tokenizer characters is made of training text"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_and_code_2(program, tmp_path: Path, changes, line):  # noqa: F811
    flags = ppo(tmp_path, **changes)
    if "OTHER" in flags.values():
        config = load_settings(RECIPES["ppo"].config, None, ppo(tmp_path))
        network = network_config(config.model, type("Tokenizer", (), {"vocab_size": 9}))
        save_scalar(random_scalar(network, key=jax.random.key(0)), tmp_path / "other")
        flags["critic.checkpoint"] = str(tmp_path / "other")
    code, error = program("ppo", *argv(flags))
    last = error.splitlines()[-1]
    assert code == 2 and last.startswith("train.py: ") and line in last, error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_epochs_of_the_data_become_steps(tmp_path: Path):
    changes = {"trainer.steps": "null", "trainer.epochs": "1.5", "experience.epochs": "4"}
    config = load_settings(RECIPES["ppo"].config, None, ppo(tmp_path, **changes))
    run = prepare("ppo", RECIPES["ppo"], config, resume=False, cache_dir=tmp_path)
    assert run.num_steps == 54  # of 18 prompts, two in an update, each of them in four
    assert isinstance(run.model.value_D, HeadParam) and not run.model.value_D[...].any()
