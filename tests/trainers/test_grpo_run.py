"""Runs of GRPO as a whole: resumed wherever they stood, they are the runs that were never interrupted."""

import asyncio
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import train
from inference.rollout import sampler
from models.llama import PRESETS, load_pretrained
from tests.trainers.runs import RECIPES, argv, completions, go, metrics, numbers, reinforcing, same, share_of_a, words
from trainers.checkpoints import Checkpointer
from trainers.export import restore_model
from trainers.grpo_recipe import GRPORecipe
from trainers.grpo_trainer import GRPOTrainer
from trainers.observers import RunError
from trainers.rollout_recipe import check_length
from trainers.run import prepare
from utils.rope import DynamicScaling
from utils.settings import load_settings

ROOT = Path(train.__file__).parent
ALL = {
    "experience.updates_per_rollout": "2",
    "experience.epochs_per_rollout": "2",
    "experience.dynamic_sampling": "2",
    "experience.top_entropy": "0.5",
    "trainer.accumulation_steps": "2",
    "loss.beta": "0.05",
    "log.completions_every": "1",
}
LORA = {"lora.rank": "2", "lora.alpha": "4", "loss.beta": "0.05", "trainer.steps": "5"}


@pytest.fixture
def program(capsys, tmp_path: Path, monkeypatch) -> Callable[..., tuple[int, str]]:
    """Call the program in this process; returns its exit code and what it wrote to standard error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*args: str) -> tuple[int, str]:
        capsys.readouterr()
        try:
            train.main(args)
            code = 0
        except SystemExit as end:
            code = end.code
        call.out, error = capsys.readouterr()
        assert "Traceback" not in error
        return code, error

    return call


class Fragile:
    """A reward that fails at one of its calls, unless it has been mended."""

    def __init__(self):
        self.calls, self.fails_at = 0, None

    def __call__(self, completions, **_):
        self.calls += 1
        if self.fails_at is not None and self.calls >= self.fails_at:
            raise ZeroDivisionError("no judge")
        return share_of_a(completions)


fragile = Fragile()
FRAGILE = {"rewards": "[{function: 'tests.trainers.test_grpo_run:fragile', name: a}]"}


async def later(completions, **_):
    await asyncio.sleep(0)
    return [None if "e" in text else share for text, share in zip(completions, share_of_a(completions))]


def folders(tmp_path: Path, flags: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    return tuple({**flags, "output_dir": str(tmp_path / name)} for name in ("whole", "cut"))


def assert_the_same_run(tmp_path: Path, steps: int) -> None:
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert [row["step"] for row in metrics(tmp_path / "cut") if "loss" in row] == list(range(1, steps + 1))
    cut, whole = ((tmp_path / name / "completions.jsonl").read_bytes() for name in ("cut", "whole"))
    assert cut == whole and whole


# Resuming.


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        (ALL, (2, 3)),  # in the first rollout's first round; at the first of the second rollout's updates
        pytest.param(ALL, (1, 2, 1, 2), marks=pytest.mark.slow),
        (LORA, (3,)),
        pytest.param(
            {"experience.mask_truncated": "true", "experience.estimator": "rloo"}, (4,), marks=pytest.mark.slow
        ),
    ],
    ids=["all", "all-often", "lora", "plain"],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path, changes, stops):
    whole, cut = folders(tmp_path, reinforcing(tmp_path, **changes))
    steps = int(whole["trainer.steps"])
    expected, done = go("grpo", whole), 0
    for stop in stops:
        done += stop
        assert int(go("grpo", cut, resume=done > stop, stop_at=stop).step) == done
    state = go("grpo", cut, resume=True)
    assert same(state, expected)
    assert_the_same_run(tmp_path, steps)
    rows = [row for row in metrics(tmp_path / "whole") if "loss" in row]
    assert max(row["sampler_logprob_diff"] for row in rows) < 1e-5
    assert len({row["reward"] for row in rows}) > 1
    assert ("kl" in rows[0]) == ("loss.beta" in changes)
    if changes is LORA:
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[-1]["kl"] > 1e-6  # from the base, not from itself
    held = [
        json.loads((tmp_path / name / "checkpoints" / str(steps) / "info" / "data.json").read_text())
        for name in ("whole", "cut")
    ]
    held = [own["data_states"][0] for own in held]
    for own in held:
        own["experience"]["metrics"].pop("rollout_tokens_per_second")
    assert held[0] == held[1]
    assert {row["step"] for row in metrics(tmp_path / "cut") if "validation/reward" in row} == {
        *range(2, steps, 2),
        steps,
    }


def test_other_seeds_draw_other_completions(tmp_path: Path):
    """That the comparison above can fail."""
    flags = reinforcing(tmp_path, **{"trainer.steps": "1", "log.completions_every": "1"})
    texts = []
    for seed in ("0", "1"):
        go("grpo", {**flags, "trainer.seed": seed, "output_dir": str(tmp_path / seed)})
        texts.append([row["completion"] for row in completions(tmp_path / seed)])
    assert texts[0] != texts[1] and len(set(texts[0])) > 4


def test_patience_goes_on_where_it_stood(tmp_path: Path):
    """Rewards that are all the same: no update changes a weight, no evaluation is better."""
    changes = {"rewards": "[{function: 'regex', options: {pattern: '.*'}}]", "trainer.patience": "2"}
    flags = reinforcing(tmp_path, **changes)
    said = []
    assert int(go("grpo", flags, stop_at=3).step) == 3
    assert int(go("grpo", flags, resume=True, said=said).step) == 6
    assert said[-1] == "stopped at step 6: 2 evaluations without a lower loss"


@pytest.mark.slow
def test_kill_at_any_moment_and_resuming(program, tmp_path: Path):
    changes = {"trainer.steps": "40", "checkpoint.every_steps": "2", "checkpoint.keep_last": "2", **ALL}
    whole, cut = folders(tmp_path, reinforcing(tmp_path, **changes))
    assert program("grpo", *argv(whole))[0] == 0
    moments = random.Random(0)
    for seen in (4, 15, 30):
        process = subprocess.Popen([sys.executable, "train.py", "grpo", *argv(cut), "--resume"], cwd=ROOT)
        path = tmp_path / "cut" / "metrics.jsonl"
        while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < seen):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.wait()
    assert program("grpo", *argv(cut), "--resume")[0] == 0
    assert_the_same_run(tmp_path, 40)
    assert same(load_pretrained(tmp_path / "cut" / "hf"), load_pretrained(tmp_path / "whole" / "hf"))


# Rewards that fail.


def test_a_reward_that_raises_is_one_line_and_loses_nothing(program, tmp_path: Path):
    """In the first rollout, in an evaluation, in a later rollout; then mended. Calls: a rollout each other step, and an
    evaluation in between."""
    changes = {"trainer.steps": "5", "experience.updates_per_rollout": "2", "log.completions_every": "1"}
    changes |= {"checkpoint.every_steps": "100"}
    whole, cut = folders(tmp_path, reinforcing(tmp_path, **changes, **FRAGILE))
    fragile.fails_at = None
    expected = go("grpo", whole)
    ends = ("nothing is lost: no step was done", *(f"saved at step {n}: go on with --resume" for n in (2, 4)))
    for call, end, saved in zip((1, 2, 4), ends, (None, 2, 4)):
        fragile.calls, fragile.fails_at = 0, call
        code, error = program("grpo", *argv(cut), "--resume")
        last = error.splitlines()[-1]
        assert code == 1 and last.startswith(
            "train.py: reward a raised ZeroDivisionError: no judge for completion 0 of "
        )
        assert re.search(r", of the prompt '\w+ \w+'; ", last) and last.endswith(end)
        assert Checkpointer(tmp_path / "cut" / "checkpoints").latest() == saved
    fragile.fails_at = None
    assert same(go("grpo", cut, resume=True), expected)
    assert_the_same_run(tmp_path, 5)


def test_a_bad_row_on_the_way_loses_nothing_and_may_be_skipped(tmp_path: Path):
    flags = reinforcing(tmp_path, **{"trainer.steps": "8", "checkpoint.every_steps": "100"})
    path = tmp_path / "prompts.jsonl"
    *rows, last = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*rows, '{"prompt": 3}\n', last]))
    whole, cut = folders(tmp_path, flags)
    with pytest.raises(RunError, match=r"prompts\.jsonl:20: .*; saved at step [1-7]: go on with --resume"):
        go("grpo", cut)
    expected = go("grpo", whole | {"data.on_bad_row": "skip"})
    assert same(go("grpo", cut | {"data.on_bad_row": "skip"}, resume=True), expected)
    assert_the_same_run(tmp_path, 8)


# Rewards of one's own, and the program around them.


def test_rewards_of_a_file_and_a_module_async_and_none_from_yaml(program, tmp_path: Path):
    (tmp_path / "own.py").write_text(
        "def same_end(completions, answer, letters=1, **_):\n"
        "    return [float(a[-letters:] == c[-letters:]) for a, c in zip(answer, completions)]\n"
    )
    flags = reinforcing(tmp_path, **{"trainer.steps": "2", "log.completions_every": "1", "trainer.eval_every": "4"})
    del flags["rewards"]
    (tmp_path / "own.yaml").write_text(
        f"rewards:\n  - function: {tmp_path}/own.py:same_end\n    weight: 2\n    options: {{letters: 2}}\n"
        "  - function: tests.trainers.test_grpo_run:later\n    weight: 0.5\n"
    )
    flags |= {"log.progress": "lines", "log.completions_shown": "2", "trainer.patience": "null"}
    code, error = program("grpo", "--config", str(tmp_path / "own.yaml"), *argv(flags))
    assert code == 0, error
    assert "rollouts of 2 prompts x 4 completions for 1 updates each" in error
    assert "completions of step 1" in error and "same_end" in error
    rows = completions(tmp_path / "run")
    assert len(rows) == 2 * 2 * 4
    for row in rows:
        expected = row["rewards"]["same_end"] * 2 + (row["rewards"]["later"] or 0) * 0.5
        assert row["reward"] == pytest.approx(expected) and (row["rewards"]["later"] is None) == (
            "e" in row["completion"]
        )
    assert {row["rewards"]["later"] is None for row in rows} == {True, False}
    first = next(row for row in metrics(tmp_path / "run") if row["step"] == 1)
    own = [row for row in rows if row["step"] == 1]
    assert first["reward"] == pytest.approx(sum(row["reward"] for row in own) / 8)
    known = [row["rewards"]["later"] for row in own if row["rewards"]["later"] is not None]
    assert first["rewards/later/mean"] == pytest.approx(sum(known) / len(known))
    assert first["completions/mean_length"] == sum(row["tokens"] for row in own) / 8
    assert first["completions/clipped_ratio"] == sum(not row["ended"] for row in own) / 8
    assert {"time/rollout", "time/rewards", "time/train"} <= set(metrics(tmp_path / "run")[1])


def test_none_from_all_rewards_is_no_number_and_teaches_nothing(tmp_path: Path):
    (tmp_path / "none.py").write_text("def none(completions, **_):\n    return [None] * len(completions)\n")
    changes = {
        "rewards": f"[{{function: '{tmp_path}/none.py:none'}}]",
        "trainer.steps": "2",
        "trainer.patience": "null",
    }
    flags = reinforcing(tmp_path, **changes, **{"experience.updates_per_rollout": "2"})
    go("grpo", flags, stop_at=1)
    go("grpo", flags, resume=True)
    rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert [row["reward"] for row in rows] == [None, None] and rows[1]["grad_norm"] == 0 and rows[1]["skipped"] == 0


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rewards": "[]"}, "rewards is empty: there is nothing to learn from"),
        ({"rewards": "null"}, "rewards"),
        ({"rewards": "[{function: exact_mach}]"}, "reward 'exact_mach' is none of exact_match"),
        ({"rewards": "[{function: 'no.such:f'}]"}, "reward no.such:f: importing no.such raised ModuleNotFoundError"),
        ({"rewards": "[{function: 'tests.trainers.runs:share_of_b'}]"}, "did you mean share_of_a?"),
        ({"rewards": "[{function: 'nowhere.py:f'}]"}, "importing nowhere.py raised FileNotFoundError"),
        ({"rewards": "[{function: regex, weigt: 2}]"}, "weigt"),
        ({"data.train": "no/such.jsonl"}, "no such file, folder or data set: no/such.jsonl"),
        ({"data.train": "BAD"}, "bad.jsonl:2: "),
        ({"data.max_prompt_length": "2"}, "prompts can be used"),
        (
            {"data.max_prompt_length": "27"},
            "max_prompt_length 27 and rollout.max_completion_length 6 are together longer",
        ),
        ({"rollout.max_completion_length": "0"}, "max_completion_length 0 and completions 4 must be at least 1"),
        ({"rollout.completions": "1"}, "rollout.completions 1 leaves nothing to compare a completion with"),
        ({"rollout.completions": "1", "experience.scale_rewards": "batch"}, "completions 1 leaves nothing to compare"),
        ({"data.validation_fraction": "0", "data.validation": "LONG"}, "not one of 2 prompts can be used"),
        ({"rollout.temperature": "0"}, "temperature 0.0 must be above 0"),
        ({"rollout.top_p": "2"}, "top_p"),
        ({"rollout.max_new_tokens": "2"}, "--rollout.max_new_tokens: unknown"),
        ({"trainer.batch_size": "3", "trainer.accumulation_steps": "2"}, "batch_size 3 is not a multiple of"),
        ({"experience.top_entropy": "2"}, "top_entropy 2.0 must be above 0 and at most 1"),
        ({"loss.name": "ppo"}, "ppo"),
        ({"loss.beta": "-1"}, "beta -1.0 must be at least 0"),
        ({"tokenizer": "characters"}, "tokenizer characters is made of training text"),
        ({"trainer.patience": "null", "checkpoint.metric": "validation/accuracy"}, "validation/accuracy"),
        ({"log.completions_every": "0"}, "completions_every must be at least 1"),
        ({"mesh.data": "2"}, "a mesh of data=2, fsdp=1, tensor=1, sequence=1 does not fit 1 devices"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_and_code_2(program, tmp_path: Path, changes, line):
    flags = reinforcing(tmp_path, **changes)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "cat"}\n{"prompt": 3}\n')
    (tmp_path / "long.jsonl").write_text(f'{{"prompt": "{words(9)}"}}\n' * 2)
    files = {name.upper(): str(tmp_path / f"{name}.jsonl") for name in ("bad", "long")}
    flags = {key: files.get(value, value) for key, value in flags.items()}
    code, error = program("grpo", *argv(flags))
    last = error.splitlines()[-1]
    assert code == 2 and last.startswith("train.py: ") and line in last, error
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").stat().st_size


def test_dynamic_scaling_is_for_texts_within_its_context(tmp_path: Path):
    scaling = DynamicScaling(factor=4.0, original_context=22)
    scaled = replace(PRESETS["tiny"], max_position_embeddings=22, rope_scaling=scaling)
    config = load_settings(RECIPES["grpo"].config, None, reinforcing(tmp_path))
    check_length(config, scaled)
    config = load_settings(RECIPES["grpo"].config, None, reinforcing(tmp_path, **{"data.max_prompt_length": "17"}))
    with pytest.raises(ValueError, match="6 are together longer than 22 tokens"):
        check_length(config, scaled)


@pytest.mark.parametrize(
    ("epochs", "rounds", "updates", "steps"), [("1", "1", "1", 9), ("1.5", "2", "1", 27), ("1", "2", "4", 18)]
)
def test_epochs_become_steps(tmp_path: Path, epochs, rounds, updates, steps):
    changes = {"trainer.steps": "null", "trainer.epochs": epochs, "data.validation_fraction": "0.1"}
    changes |= {"experience.epochs_per_rollout": rounds, "experience.updates_per_rollout": updates}
    config = load_settings(RECIPES["grpo"].config, None, reinforcing(tmp_path, **changes))
    run = prepare("grpo", RECIPES["grpo"], config, resume=False, cache_dir=tmp_path)
    assert run.num_steps == steps  # of 18 prompts, two in an update


def test_validation_is_by_one_greedy_completion(tmp_path: Path):
    made = []

    def spy(**options):
        made.append(options)
        return sampler(**options)

    recipe = GRPORecipe(GRPOTrainer, spy)
    flags = reinforcing(tmp_path, **{"rollout.top_k": "3", "rollout.top_p": "0.5", "rollout.min_p": "0.1"})
    prepare("grpo", recipe, load_settings(recipe.config, None, flags), resume=False, cache_dir=tmp_path)
    drawn, greedy = made
    own = ("num_samples", "temperature", "top_k", "top_p", "min_p", "max_new_tokens")
    assert [drawn[name] for name in own] == [4, 1.0, 3, 0.5, 0.1, 6] and len(drawn["stop_ids"]) == 2
    assert [greedy[name] for name in own] == [1, 0.0, None, 1.0, 0.0, 6] and greedy["stop_ids"] == drawn["stop_ids"]


def test_a_rollout_that_is_not_used_up_ends_with_the_run(tmp_path: Path):
    """Updates that do not divide the steps, completions of a token, pairs of them."""
    changes = {"rollout.max_completion_length": "1", "rollout.completions": "2", "experience.updates_per_rollout": "3"}
    flags = reinforcing(tmp_path, **changes, **{"trainer.steps": "4", "log.completions_every": "4"})
    assert int(go("grpo", flags).step) == 4
    rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert [row["completions/max_length"] for row in rows] == [1] * 4
    assert [row["step"] for row in completions(tmp_path / "run")] == [4] * 3 * 2 * 2


def test_what_is_exported_is_the_state(program, tmp_path: Path):
    flags = reinforcing(tmp_path, **{"trainer.steps": "3", **{"experience.updates_per_rollout": "2"}})
    code, error = program("grpo", *argv(flags))
    folder = tmp_path / "run"
    assert code == 0 and error.splitlines()[-1] == f"wrote {folder / 'hf'}"
    code, error = program("export", f"--run={folder}", f"--output={tmp_path / 'out'}")
    assert code == 0, error
    assert same(load_pretrained(tmp_path / "out" / "hf"), load_pretrained(folder / "hf"))
    networks, config, _ = restore_model(RECIPES, folder, None)
    assert same(networks["hf"], load_pretrained(folder / "hf", dtype="float32")) and config.rollout.completions == 4
    code, error = program("pretrain", *argv({"output_dir": str(folder)}), "--resume")
    assert code == 2


@pytest.mark.parametrize(
    ("changes", "words_of_the_line"),
    [
        ({"experience.updates_per_rollout": "2"}, "batches of 2 prompts, these have 4"),
        ({"data.max_prompt_length": "15"}, "max_prompt_length"),
    ],
)
def test_a_run_cannot_go_on_as_another(tmp_path: Path, changes, words_of_the_line):
    flags = reinforcing(tmp_path, **{"trainer.steps": "1"})
    go("grpo", flags)
    with pytest.raises(ValueError, match=words_of_the_line):
        go("grpo", flags | {"trainer.steps": "4"} | changes, resume=True)


def test_a_run_may_go_on_with_fewer_completions(tmp_path: Path):
    changes = {"experience.updates_per_rollout": "2", "rollout.completions": "4", "trainer.steps": "4"}
    flags = reinforcing(tmp_path, **changes)
    go("grpo", flags, stop_at=1)  # another batch of four is in flight
    assert int(go("grpo", flags | {"rollout.completions": "2"}, resume=True).step) == 4


def test_what_was_left_out_and_what_cannot_end_are_said(tmp_path: Path):
    changes = {"data.max_prompt_length": "7", "trainer.steps": "1", "tokenizer": str(tmp_path / "endless")}
    flags = reinforcing(tmp_path, **changes, **{"data.validation_fraction": "0", "trainer.patience": "null"})
    flags |= {"checkpoint.metric": "null", "checkpoint.keep_best": "0", "trainer.batch_size": "16"}
    shutil.copytree(tmp_path / "characters", tmp_path / "endless")
    (tmp_path / "endless" / "generation_config.json").unlink()
    (tmp_path / "endless" / "tokenizer_config.json").write_text("{}")
    said = []
    go("grpo", flags, said=said)
    assert re.fullmatch(r"\d+ prompts longer than 7 tokens left out", said[-1])
    config = load_settings(RECIPES["grpo"].config, None, flags | {"output_dir": str(tmp_path / "other")})
    run = prepare("grpo", RECIPES["grpo"], config, resume=False, cache_dir=tmp_path)
    assert "the tokenizer names no token that ends a completion: all have 6 tokens" in run.describe()


def test_a_run_in_which_all_completions_are_cut_off_and_masked_says_so(tmp_path: Path):
    changes = {"rollout.max_completion_length": "1", "experience.mask_truncated": "true", "trainer.max_bad_steps": "2"}
    flags = reinforcing(tmp_path, **changes, **{"data.validation_fraction": "0", "trainer.patience": "null"})
    flags |= {"checkpoint.metric": "null", "checkpoint.keep_best": "0", "tokenizer": str(tmp_path / "endless")}
    shutil.copytree(tmp_path / "characters", tmp_path / "endless")
    (tmp_path / "endless" / "generation_config.json").unlink()
    (tmp_path / "endless" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(RunError, match="no token had a weight for 2 steps up to step 2"):
        go("grpo", flags)
    assert all(row["skipped"] == row["step"] for row in metrics(tmp_path / "run"))
