"""Completions in a file and in a table."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from data.prompts import Prompt
from trainers.completions_log import CompletionsLog
from trainers.groups import Group


class Rollouts:
    """Of an experience, what the log sees: in each step the groups of a new rollout or none, and what is to come."""

    def __init__(self):
        self.groups, self.num_waiting = [], 0


def group(text: str, rewards: tuple[float, float] = (1.0, 0.5), prompt=None) -> Group:
    asked = Prompt(ids=(1,), prompt=f"say {text}" if prompt is None else prompt, columns={}, index=0)
    return Group(
        prompt=asked,
        tokens_CM=np.zeros((2, 4), np.int32),
        count_C=np.array([len(text), 3]),
        logprobs_CM=np.zeros((2, 4), np.float32),
        stopped_C=np.array([True, False]),
        texts=(text, text.upper()),
        rewards_CF=np.array([[rewards[0], np.nan], [rewards[1], 2.0]]),
        total_C=np.array([rewards[0], rewards[1] + 2.0]),
    )


def log(folder: Path, rollouts: Rollouts, **options) -> CompletionsLog:
    options = dict(every_steps=1, shown=0, table=False, resume_step=None, stream=io.StringIO()) | options
    return CompletionsLog(folder, rollouts, ["one", "two"], **options)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_line_for_each_completion(tmp_path: Path):
    rollouts = Rollouts()
    rollouts.groups = [group("né"), group("b", prompt=({"role": "user", "content": "why?"},))]
    log(tmp_path, rollouts)(7, None, {})
    rows = lines(tmp_path)
    assert len(rows) == 4 and "né" in (tmp_path / "completions.jsonl").read_text(encoding="utf-8")
    assert rows[0] == {
        "step": 7,
        "prompt": "say né",
        "completion": "né",
        "tokens": 2,
        "ended": True,
        "rewards": {"one": 1.0, "two": None},
        "reward": 1.0,
    }
    assert rows[3]["prompt"] == [{"role": "user", "content": "why?"}] and not rows[3]["ended"]


def test_a_reward_that_is_none_at_all_is_null(tmp_path: Path):
    rollouts = Rollouts()
    rollouts.groups = [group("b", rewards=(np.nan, 1.0))]
    log(tmp_path, rollouts)(1, None, {})
    assert lines(tmp_path)[0]["reward"] is None


@pytest.mark.parametrize(
    ("every", "updates", "written"),
    [(1, 1, [1, 2, 3, 4, 5, 6]), (3, 1, [3, 6]), (1, 3, [1, 4]), (2, 3, [1, 4]), (5, 3, [4]), (7, 3, [])],
)
def test_a_rollout_is_written_once_where_one_of_its_steps_is_due(tmp_path: Path, every, updates, written):
    rollouts = Rollouts()
    write = log(tmp_path, rollouts, every_steps=every)
    for step in range(1, 7):
        place = (step - 1) % updates
        rollouts.groups = [group("b")] if place == 0 else []
        rollouts.num_waiting = updates - 1 - place
        write(step, None, {})
    steps = [row["step"] for row in lines(tmp_path)] if written else []
    assert steps == [step for step in written for _ in range(2)]


def test_a_file_is_cut_where_a_run_goes_on_and_begun_anew_where_it_begins(tmp_path: Path):
    rollouts = Rollouts()
    rollouts.groups = [group("b")]
    write = log(tmp_path, rollouts)
    for step in (1, 2, 3):
        write(step, None, {})
    with (tmp_path / "completions.jsonl").open("a") as file:
        file.write('{"step": 4, "pro')
    log(tmp_path, rollouts, resume_step=2)
    assert [row["step"] for row in lines(tmp_path)] == [1, 1, 2, 2]
    log(tmp_path, rollouts)
    assert lines(tmp_path) == []


def test_the_table_has_some_of_all_prompts_and_cuts_what_is_long(tmp_path: Path):
    rollouts, stream = Rollouts(), io.StringIO()
    rollouts.groups = [group("first"), group("x" * 1000), group("[bold]last")]
    log(tmp_path, rollouts, shown=4, table=True, stream=stream)(3, None, {})
    shown = stream.getvalue()
    assert "completions of step 3" in shown and "first" in shown and "[BOLD]" in shown  # as it is, no markup
    assert shown.lower().count("x") < 1000 and "…" in shown and " two " in shown and " - " in shown
    assert shown.count("say") == 4
    for options in ({"shown": 0, "table": True}, {"shown": 4, "table": False}):
        silent = io.StringIO()
        log(tmp_path, rollouts, stream=silent, **options)(4, None, {})
        assert silent.getvalue() == ""
