"""The quickstart in a shortened form: killed, interrupted, gone on with, and what is there in the end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from models.llama import load_config, load_tokenizer
from quickstart.stages import TRAINED

pytest.importorskip("matplotlib")

# Tiny, and of few steps, on top of the real recipes.
RECIPES = {
    "corpus": "pretrain: 300\nsft: 64\ngrpo: 64\nheld_out: 16\n",
    "pretrain": """\
model:
  changes: {num_layers: 2, hidden_size: 32, intermediate_size: 48, num_heads: 2, num_kv_heads: 2, head_dim: 16}
trainer: {steps: 40, batch_size: 2, log_every: 1}
optimizer: {warmup: 2}
checkpoint: {every_steps: 4}
""",
    "sft": "trainer: {steps: 4, batch_size: 2, log_every: 1}\noptimizer: {warmup: 1}\n",
    "grpo": """\
rollout: {completions: 2, max_completion_length: 16}
trainer: {steps: 4, batch_size: 2}
optimizer: {warmup: 1}
""",
}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory, repo_root: Path) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(f"base: {repo_root / 'quickstart' / name}.yaml\n{text}")
    return folder


@pytest.fixture(scope="module")
def start(recipes: Path, repo_root: Path, tmp_path_factory) -> Callable[..., subprocess.Popen]:
    cache = str(tmp_path_factory.mktemp("cache"))

    def call(output: Path, *flags: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "quickstart", "--output", str(output), "--recipes", str(recipes), *flags]
        return subprocess.Popen(
            command,
            cwd=repo_root,
            env=os.environ | {"XDG_CACHE_HOME": cache},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return call


def wait_for_checkpoint(process: subprocess.Popen, run: Path, step: int) -> None:
    """Until a run has a checkpoint of that step or a later one."""
    while process.poll() is None:
        if any(path.name.isdecimal() and int(path.name) >= step for path in run.glob("checkpoints/*")):
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate())


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory) -> tuple[Path, str, str]:
    """The folder of a run that was killed once and interrupted once, and what its last, whole call said."""
    output = tmp_path_factory.mktemp("run") / "out"
    process = start(output)
    wait_for_checkpoint(process, output / "pretrain", 4)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    process = start(output)
    wait_for_checkpoint(process, output / "pretrain", 20)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate()
    assert process.returncode == 130 and "going on from step" in error and "goes on from here" in error, error
    process = start(output)
    out, error = process.communicate()
    assert process.returncode == 0, error
    return output, out, error


def test_what_is_done_is_not_done_again(finished):
    output, _, error = finished
    assert "writing problems" not in error and "training a tokenizer" not in error
    steps = [json.loads(line)["step"] for line in (output / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))


def test_every_stage_leaves_its_model_and_its_answers(finished):
    output, _, _ = finished
    for stage in TRAINED:
        assert load_config(output / stage / "hf").num_layers == 2
        assert load_tokenizer(output / stage / "hf").chat_template
        answers = [json.loads(line) for line in (output / f"answers_{stage}.jsonl").read_text().splitlines()]
        assert len(answers) == 16 and all("completion" in row for row in answers)
    assert set(json.loads((output / "results.json").read_text())["accuracy"]) == set(TRAINED)
    assert (output / "reward.png").is_file()


def test_it_ends_with_accuracies_the_curve_and_what_to_type(finished):
    output, out, _ = finished
    assert all(name in out for name in ("pretraining", "fine-tuning", "GRPO", "in all"))
    assert "\u2800" not in out.splitlines()[0] and "└" in out
    assert out.splitlines()[-1].endswith(f"chat.py --ckpt_dir {output / 'grpo' / 'hf'}")


def test_once_more_only_reports(finished, start):
    output, out, _ = finished
    process = start(output)
    again, error = process.communicate()
    assert (process.returncode, again) == (0, out) and "==" not in error


def test_a_folder_of_something_else_is_refused(finished, start, tmp_path):
    output, _, _ = finished
    (tmp_path / "note").write_text("mine")
    for folder, complaint in ((output, "holds the quickstart of --seed 0"), (tmp_path, "holds something else")):
        process = start(folder, "--seed", "1")
        out, error = process.communicate()
        assert (process.returncode, out) == (2, "") and complaint in error and error.count("\n") == 1
