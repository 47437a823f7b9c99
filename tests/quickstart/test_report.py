"""What the quickstart says at its end, of files written by hand."""

import json
import sys
from pathlib import Path

import pytest

from quickstart import report


def answer(text: str, *, reference: str = "62", family: str = "more", ended: str = "stop") -> dict:
    return {
        "messages": [{"role": "user", "content": f"How many is {reference}?"}],
        "answer": reference,
        "family": family,
        "completion": text,
        "finish_reason": ended,
    }


RIGHT, WRONG = answer("<think>\n27+35\n</think>\n62"), answer("<think>\n27+35\n</think>\n52")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A finished run: none, half and three quarters of four problems solved."""
    other = answer("<think>\n</think>\n7", reference="7", family="sum")
    for stage, rows in {
        "pretrain": [WRONG] * 4,
        "sft": [RIGHT, WRONG, other, WRONG],
        "grpo": [RIGHT, RIGHT, other, WRONG],
    }.items():
        (tmp_path / f"answers_{stage}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seconds = {"corpus": 1.0, "tokenizer": 0.5, "pretrain": 90.0, "sft": 20.0, "grpo": 150.0, "judging": 12.0}
    (tmp_path / "seconds.json").write_text(json.dumps(seconds))
    (tmp_path / "grpo").mkdir()
    rows = [{"step": step, "reward": step / 20} for step in range(1, 21)] + [{"step": 20, "validation/loss": 1.0}]
    (tmp_path / "grpo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize(
    ("row", "right"),
    [
        (RIGHT, True),
        (WRONG, False),
        (answer("62"), False),  # without a thought there is no answer behind it
        (answer("<think>\n</think>\n 62 \n"), True),
        (answer("<think>\n</think>\n62 apples"), False),
        (answer("<think>\n</think>\n62", ended="length"), False),
    ],
)
def test_what_counts_as_solved(row, right):
    assert report.correct(row) is right


def test_results_are_shares_of_solved_problems(output):
    found = report.results(output)
    assert found["accuracy"] == {"pretrain": 0, "sft": 0.5, "grpo": 0.75}
    assert found["families"]["sft"] == {"more": pytest.approx(1 / 3), "sum": 1}


def test_the_report_has_all_of_it(output, capsys):
    pytest.importorskip("matplotlib")
    report.report(output)
    out = capsys.readouterr().out
    assert "0.0%" in out and "50.0%" in out and "75.0%" in out and "274" in out  # seconds in all
    assert out.count("before:") == 1 and "52" in out.split("before:")[1].split("after:")[0]
    assert (output / "reward.png").is_file() and json.loads((output / "results.json").read_text())
    command = out.splitlines()[-1]
    assert "chat.py --ckpt_dir" in command and Path(sys.executable).name in command
