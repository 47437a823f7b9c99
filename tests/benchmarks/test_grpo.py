"""The benchmark of GRPO: what its sides are told, that they do the same work, and that it runs."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import grpo
from benchmarks.comparison import Process, alone
from benchmarks.grpo_work import NUM_BATCHES, SETTINGS, Work, reward
from benchmarks.peers import LOWEST_ID, save_random_model
from benchmarks.turns import Order, check_settings


@pytest.fixture
def work(tmp_path) -> Work:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 50}))
    sizes = dict(prompts=3, completions=4, prompt_tokens=6, new_tokens=5)
    return Work(folder=str(tmp_path), dtype="float32", device="cpu", **sizes)


def test_prompts_are_the_same_for_all_and_differ_by_step(work):
    first = np.array(work.prompt_ids(0))
    assert first.shape == (3, 6) and first.min() >= LOWEST_ID and first.max() < 50
    np.testing.assert_array_equal(first, dataclasses.replace(work).prompt_ids(NUM_BATCHES))
    assert first.tolist() != work.prompt_ids(1)


def test_rewards_of_random_completions_differ_whatever_the_type_of_the_ids():
    ids = np.random.default_rng(0).integers(0, 16000, (8, 64))
    rewards = reward(completion_ids=ids.tolist(), prompts=None)
    assert len(set(rewards)) > 4 and all(0 <= value <= 1 for value in rewards)
    assert reward([[str(number) for number in row] for row in ids]) == rewards


@pytest.mark.parametrize(
    ("kind", "word"),
    (("tunix", "halves"), ("ours", "checkpointing"), ("trl", "micro"), ("trl", "plain"), ("tunix", "checkpointing")),
)
def test_settings_of_another_side_are_refused(kind, word):
    check_settings(kind, ("pages", "micro8"), SETTINGS)
    with pytest.raises(ValueError, match=f"'{word}' is no setting of {kind}"):
        check_settings(kind, ("pages", word), SETTINGS)


def test_a_side_is_called_by_its_settings(work):
    side = grpo._side("trl", "micro6+checkpointing", work, sys.executable)
    assert side.name == "trl micro6 checkpointing" and side.order.micro() == 6
    assert grpo._side("ours", "pages", work, sys.executable).name == "ropewalk pages"
    assert grpo._side("trl", "plain", work, sys.executable).order == Order(kind="trl", settings=(), work=work)


@pytest.mark.parametrize(("kind", "setting"), (("trl", "micro5"), ("tunix", "micro6")))
def test_micro_batches_that_do_not_fit_are_refused(work, kind, setting):
    with pytest.raises(ValueError, match=f"3 x 4 completions cannot be cut into {setting}"):
        grpo._side(kind, setting, work, sys.executable)


@pytest.mark.parametrize("changed", ({"grad_norm": 1.003}, {"entropy": 9.5}, {"grad_norm": math.nan}))
def test_peers_that_do_not_do_the_same_are_not_timed(changed):
    ours, theirs = {"grad_norm": 1.0, "entropy": 9.0}, {"grad_norm": 1.0005, "entropy": 9.001}
    grpo._check_peers({"trl": theirs, "tunix": theirs | {"entropy": None}}, [ours, ours], "float32")
    with pytest.raises(ValueError, match="of ropewalk and trl differ"):
        grpo._check_peers({"trl": theirs | changed}, [ours], "float32")


class Answers:
    """A process that answers without one."""

    def __init__(self, **figures):
        self._figures = figures

    def step(self) -> dict:
        return self._figures


def test_steps_that_learn_from_fewer_tokens_or_have_no_gradient_are_refused(work):
    side = grpo._side("trl", "plain", work, sys.executable)
    grpo._checked_step(side, Answers(tokens=60, grad_norm=1.0))
    grpo._checked_step(side, Answers(tokens=60, grad_norm=None))
    with pytest.raises(ValueError, match="59 tokens, not 60"):
        grpo._checked_step(side, Answers(tokens=59, grad_norm=1.0))
    for norm in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="gradient of norm"):
            grpo._checked_step(side, Answers(tokens=60, grad_norm=norm))


def test_a_side_that_ends_says_why(work):
    process = Process(grpo._side("tunix", "plain", work, sys.executable))
    try:
        with pytest.raises(RuntimeError, match=r"Error: "):
            process.step()
    finally:
        process.close()


@pytest.mark.slow
def test_a_step_is_timed_beside_trl(repo_root):
    pytest.importorskip("trl")
    sizes = ("--shape", "tiny", "--prompts", "2", "--completions", "3", "--prompt_tokens", "6", "--new_tokens", "5")
    flags = (*sizes, "--peer", "trl", "--trl", "plain,micro3+checkpointing", "--rounds", "1")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.grpo", *flags], cwd=repo_root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"][
        2:
    ]
    assert [row[0] for row in rows] == ["trl", "trl micro3 checkpointing", "ropewalk pages"]
    for row in rows:
        step, rollout, score, train = map(float, row[2:6])
        assert step == pytest.approx(rollout + score + train, abs=0.005) and min(step, rollout, train) > 0
        assert float(row[6]) == pytest.approx(2 * 3 * 5 / rollout, rel=0.2)
    assert [row[8].endswith("x (its fastest)") for row in rows[:2]].count(True) == 1 and rows[2][8] == ""


@pytest.mark.slow
def test_sides_come_alone_where_there_is_room_for_one(tmp_path, capfd):
    pytest.importorskip("trl")
    work = Work(
        folder=str(tmp_path), prompts=2, completions=3, prompt_tokens=6, new_tokens=5, dtype="float32", device="cpu"
    )
    ours, peer = (grpo._side(kind, "micro3", work, sys.executable) for kind in ("ours", "trl"))
    alone(save_random_model, "tiny", str(tmp_path), "cpu", False)
    table = grpo._table(work)
    figures, batch = grpo._measure_alone(ours, 1, 1)
    assert batch is None
    table.add({ours.name: figures})
    figures, batch = grpo._measure_alone(peer, 1, 1)
    table.add({peer.name: figures})
    grpo._check_behind(peer, batch, ours)
    with pytest.raises(ValueError, match="grad_norm of ropewalk and trl micro3 differ"):
        grpo._check_behind(peer, batch | {"grad_norm": 2 * batch["grad_norm"]}, ours)
    printed, progress = capfd.readouterr()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()][2:]
    assert [row[0] for row in rows] == ["ropewalk micro3", "trl micro3"]
    assert rows[1][8].endswith("x (its fastest)")
    assert "trl micro3: rollout took" in progress and "trl micro3 does the same as ours" in progress


def test_a_side_that_fails_alone_has_a_row(work, capsys):
    figures, batch = grpo._measure_alone(grpo._side("tunix", "plain", work, sys.executable), 1, 1)
    assert batch is None and set(figures) == {"error"}
    grpo._table(work).add({"tunix": figures})
    assert "| tunix | failed |" in capsys.readouterr().out
