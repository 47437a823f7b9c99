"""What has come of a quickstart: accuracy by stage, answers before and after, the reward curve, how to talk to it."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quickstart import plot
from quickstart.stages import TRAINED
from trainers.reward_functions import ExactMatch

_LEARNT = {"pretrain": "pretraining", "sft": "supervised fine-tuning", "grpo": "GRPO"}
_SAMPLES = 3
_DEFAULT = Path("runs/quickstart")  # what chat.py finds by itself


def correct(row: Mapping[str, Any]) -> bool:
    """Whether a line of answers is right, by the measure that GRPO was rewarded by, and has ended by itself."""
    [score] = ExactMatch(after="</think>")(completions=[row["completion"]], answer=[row["answer"]])
    return bool(score) and row["finish_reason"] == "stop"


def results(output: Path) -> dict[str, Any]:
    """Held-out accuracy after each stage, also by family of problems, and the seconds that everything took."""
    accuracy, families = {}, {}
    for stage in TRAINED:
        rows = _read_lines(output / f"answers_{stage}.jsonl")
        accuracy[stage] = _share(rows)
        names = dict.fromkeys(row["family"] for row in rows)
        families[stage] = {name: _share([row for row in rows if row["family"] == name]) for name in names}
    seconds = json.loads((output / "seconds.json").read_text())
    return {"accuracy": accuracy, "families": families, "seconds": seconds}


def report(output: Path) -> None:
    """Print it, and write results.json and reward.png."""
    found = results(output)
    (output / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    print(_table(found))
    print(_answers(output))
    rows = [row for row in _read_lines(output / "grpo" / "metrics.jsonl") if "reward" in row]
    steps, rewards = [row["step"] for row in rows], [row["reward"] for row in rows]
    before, after = (found["accuracy"][stage] for stage in ("sft", "grpo"))
    marks = [
        (steps[0], before, f"held-out problems before: {before:.0%}"),
        (steps[-1], after, f"held-out problems after: {after:.0%}"),
    ]
    plot.save(output / "reward.png", steps, rewards, marks=marks)
    print(plot.draw(steps, plot.smooth(rewards), title="\nreward of GRPO's answers, smoothed"))
    print(f"\nplot: {output / 'reward.png'}")
    print(f"talk to it: {_command(output)}")


def _table(found: Mapping[str, Any]) -> str:
    seconds = found["seconds"]
    lines = ["", f"{'':<24}{'seconds':>9}{'held-out problems solved':>27}"]
    lines.append(f"{'problems and tokenizer':<24}{seconds['corpus'] + seconds['tokenizer']:>9.0f}")
    for stage in TRAINED:
        lines.append(f"{_LEARNT[stage]:<24}{seconds[stage]:>9.0f}{found['accuracy'][stage]:>27.1%}")
    lines.append(f"{'judging':<24}{seconds['judging']:>9.0f}")
    lines.append(f"{'in all':<24}{sum(seconds.values()):>9.0f}")
    return "\n".join(lines)


def _answers(output: Path) -> str:
    """Some problems that GRPO made the difference for, as answered before and after it."""
    before, after = (_read_lines(output / f"answers_{stage}.jsonl") for stage in ("sft", "grpo"))
    pairs = [(old, new) for old, new in zip(before, after) if correct(new) and not correct(old)]
    lines = ["", "Held-out problems that it solves since GRPO:"]
    for old, new in pairs[:_SAMPLES]:
        lines += ["", old["messages"][-1]["content"]]
        lines += [f"  {name} {_one_line(row['completion'])}" for name, row in (("before:", old), ("after: ", new))]
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _command(output: Path) -> str:
    """What to type for a conversation, here and with this Python."""
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
    return f"{python} chat.py" + ("" if output == _DEFAULT else f" --ckpt_dir {output / 'grpo' / 'hf'}")


def _share(rows: Sequence[Mapping[str, Any]]) -> float:
    return sum(map(correct, rows)) / len(rows)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]
