"""Whether a small storyteller learns what is preferred: DPO, a reward model, and PPO with that reward model.

    python -m benchmarks.alignment --checkpoint stories260k/hf

The checkpoint tells its own stories. Those that begin with a sentence that names somebody give openings; of several
continuations of an opening, those that name that somebody again are preferred to those that do not, which is the pair.
A tenth of the openings is held out. `train.py` learns from the pairs by `reward` and by `dpo`, each beginning with the
checkpoint, and from the openings by `ppo`, whose reward is the reward model alone. Then each policy continues the
held-out openings anew. Everything is in `--output`, where what is there already is not done again; the figures are
printed as Markdown, and the curves drawn to `--plot`.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fire
import numpy as np

_NAMED = re.compile(r"(.*?\bnamed ([A-Z][a-z]+)\b[^.]*\.)")
_OPENING_TOKENS = 48  # of a story, of which the first sentence is the opening
_HELD_OUT = 0.1
_ROWS_AT_ONCE = 512
_COMMON = {
    "trainer.log_every": 1,
    "trainer.eval_at_start": "true",
    "checkpoint.every_steps": 100,
    "checkpoint.keep_last": 1,
}
_OF_PAIRS = {
    "data.max_prompt_length": 48,
    "data.max_completion_length": 48,
    "trainer.batch_size": 32,
    "trainer.eval_every": 40,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "reward": _OF_PAIRS | {"trainer.epochs": 4, "trainer.learning_rate": "3e-3"},
    "dpo": _OF_PAIRS | {"trainer.epochs": 5, "trainer.learning_rate": "1e-3", "loss.beta": 0.1, "loss.sft_weight": 0.5},
    "ppo": {
        "data.max_prompt_length": 48,
        "rollout.max_completion_length": 32,
        "critic.kind": "separate",
        "experience.kl_coef": 0.1,
        "trainer.batch_size": 64,
        "trainer.steps": 60,
        "trainer.learning_rate": "5e-4",
        "trainer.eval_every": 20,
    },
}
# What is told of a run: its metric, and what that is.
FIGURES = (
    ("reward", "validation/accuracy", "accuracy on held-out pairs"),
    ("dpo", "validation/rewards/accuracies", "accuracy on held-out pairs"),
    ("ppo", "objective/scores", "mean score of the reward model"),
    ("ppo", "objective/kl", "KL from the reference, nats a completion"),
)


def main(
    checkpoint: str,
    output: str = "runs/alignment",
    stories: int = 3000,
    samples: int = 8,
    new_tokens: int = 32,
    seed: int = 0,
    plot: str | None = None,
    only: str = "reward,dpo,ppo",
    steps: str | None = None,
) -> None:
    """Print a Markdown table of what was learnt.

    Args:
        checkpoint: The storyteller, a Hugging Face folder with its tokenizer.
        output: Folder of the data and the runs.
        stories: To be told for openings.
        samples: Continuations of each opening, also of fresh ones.
        new_tokens: In each continuation.
        seed: Of all that is drawn.
        plot: PNG to draw the curves to.
        only: Algorithms to run; ppo needs what reward has written.
        steps: Of each run, instead of the settings in configs/.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = only if isinstance(only, tuple | list) else only.split(",")
    tell = _Teller(checkpoint, samples=samples, new_tokens=new_tokens, seed=seed)
    if not (folder / "openings.train.jsonl").is_file():
        _write_data(folder, checkpoint, tell, stories, seed)
    held_out = [json.loads(line) for line in (folder / "openings.held_out.jsonl").read_text().splitlines()]
    policies = {"before": checkpoint}
    for name in wanted:
        run = folder / name
        if not (run / "hf" / "config.json").is_file():
            _train(name, folder, checkpoint, seed, steps)
        if name != "reward":
            policies[name] = str(run / "hf")
    rates = _once(folder / f"rates.{'.'.join(policies)}.json", lambda: _rates(policies, held_out, tell))
    records = {name: _records(folder / name) for name in wanted}
    print("\n".join(table(records, rates)))
    if plot is not None:
        draw(Path(plot), records)


class _Teller:
    """Continues openings with a checkpoint, by temperature 1."""

    def __init__(self, checkpoint: str, *, samples: int, new_tokens: int, seed: int):
        from models.llama import load_tokenizer

        self._tokenizer = load_tokenizer(checkpoint)
        self.samples, self._new_tokens, self._seed = samples, new_tokens, seed

    def stories(self, checkpoint: str, count: int) -> list[str]:
        """Beginnings of stories, from nothing."""
        bos = [self._tokenizer.bos_id]
        return [texts[0] for texts in self._draw(checkpoint, [bos] * count, _OPENING_TOKENS, samples=1)]

    def continuations(self, checkpoint: str, openings: Sequence[str], *, fresh: bool = False) -> list[list[str]]:
        """Several of each opening; `fresh` ones are drawn with another seed."""
        ids = [self._tokenizer.encode(opening, add_bos=self._tokenizer.adds_bos) for opening in openings]
        return self._draw(checkpoint, ids, self._new_tokens, samples=self.samples, seed=self._seed + 1 + fresh)

    def _draw(
        self, checkpoint: str, prompts: list[list[int]], new_tokens: int, *, samples: int, seed: int | None = None
    ) -> list[list[str]]:
        from inference.rollout import sampler
        from models.llama import load_pretrained

        tokenizer = self._tokenizer
        roll_out = sampler(
            max_new_tokens=new_tokens,
            num_samples=samples,
            temperature=1.0,
            top_k=None,
            top_p=1.0,
            min_p=0.0,
            stop_ids=frozenset(tokenizer.stop_ids) | {tokenizer.bos_id},
            seed=self._seed if seed is None else seed,
            rows_at_once=_ROWS_AT_ONCE,
        )
        drawn = roll_out(load_pretrained(checkpoint), prompts, range(len(prompts)))
        texts = []
        for row, (tokens_M, count) in enumerate(zip(drawn.tokens_BM, drawn.count_B)):
            prompt = prompts[row // samples]
            whole = tokenizer.decode([*prompt, *tokens_M[:count].tolist()], skip_special=True)
            texts.append(whole[len(tokenizer.decode(prompt, skip_special=True)) :])
        return [texts[first : first + samples] for first in range(0, len(texts), samples)]


def _write_data(folder: Path, checkpoint: str, tell: _Teller, count: int, seed: int) -> None:
    """Pairs and openings to learn from, and others that are held out; the openings to learn from come last."""
    found = {match[1].strip(): match[2] for story in tell.stories(checkpoint, count) if (match := _NAMED.match(story))}
    openings = sorted(found)
    np.random.default_rng(seed).shuffle(openings)
    held = max(1, round(_HELD_OUT * len(openings)))
    drawn = dict(zip(openings, tell.continuations(checkpoint, openings)))
    for name, own in (("held_out", openings[:held]), ("train", openings[held:])):
        pairs = [pair for opening in own for pair in _pairs(opening, found[opening], drawn[opening])]
        _write(folder / f"pairs.{name}.jsonl", pairs)
        _write(folder / f"openings.{name}.jsonl", [{"prompt": text, "name": found[text]} for text in own])


def _pairs(opening: str, name: str, continuations: Sequence[str]) -> list[dict[str, str]]:
    """As many as there are, each continuation in one of them."""
    good = [text for text in continuations if name in text]
    bad = [text for text in continuations if name not in text]
    return [{"prompt": opening, "chosen": chosen, "rejected": rejected} for chosen, rejected in zip(good, bad)]


def _train(name: str, folder: Path, checkpoint: str, seed: int, steps: str | None) -> None:
    """Run `train.py`, which goes on where an earlier one ended."""
    data = "openings" if name == "ppo" else "pairs"
    flags = {
        **_COMMON,
        **SETTINGS[name],
        "output_dir": folder / name,
        "model.checkpoint": checkpoint,
        "data.train": folder / f"{data}.train.jsonl",
        "data.validation": folder / f"{data}.held_out.jsonl",
        "trainer.seed": seed,
    }
    if name == "ppo":
        reward_model = str(folder / "reward" / "hf")
        flags["rewards"] = json.dumps([{"function": "reward_model", "options": {"checkpoint": reward_model}}])
        flags["critic.checkpoint"] = reward_model
    if steps is not None:
        flags |= {"trainer.steps": steps, "trainer.epochs": "null"}
    command = [sys.executable, "-m", "train", name, "--resume"]
    subprocess.run([*command, *(f"--{key}={value}" for key, value in flags.items())], check=True)


def _rates(policies: dict[str, str], openings: list[dict[str, str]], tell: _Teller) -> dict[str, float]:
    """The share of fresh continuations that name who the opening names."""
    rates = {}
    for policy, checkpoint in policies.items():
        texts = tell.continuations(checkpoint, [row["prompt"] for row in openings], fresh=True)
        hits = [row["name"] in text for row, own in zip(openings, texts) for text in own]
        rates[policy] = float(np.mean(hits))
    return rates


def _records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _once(path: Path, make: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What a file holds, which is made where it is not there yet."""
    if not path.is_file():
        _write(path, [make()])
    return json.loads(path.read_text())


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


def curve(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric."""
    found = [(row["step"], row[name]) for row in records if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def table(records: dict[str, list[dict[str, Any]]], rates: dict[str, float]) -> list[str]:
    """Markdown: what each algorithm began and ended with."""
    lines = ["| run | figure | before | after |", "|---|---|---:|---:|"]
    for run, name, title in FIGURES:
        if run in records:
            _, values = curve(records[run], name)
            lines.append(f"| `{run}` | {title} | {values[0]:.3f} | {values[-1]:.3f} |")
    for policy in rates:
        if policy != "before":
            share = f"{rates['before']:.1%} | {rates[policy]:.1%}"
            lines.append(f"| `{policy}` | fresh continuations that name who the opening names | {share} |")
    return lines


def draw(path: Path, records: dict[str, list[dict[str, Any]]]) -> None:
    """Write a PNG of the curves."""
    from matplotlib.figure import Figure

    shown = [figure for figure in FIGURES if figure[0] in records]
    figure = Figure(figsize=(3.2 * len(shown), 3), dpi=150, layout="constrained")
    for axes, (run, name, title) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        axes.plot(*curve(records[run], name), color="#1f4e8c", marker="o" if name.startswith("validation") else "")
        axes.set(title=f"{run}: {title}", xlabel="step")
        axes.title.set_fontsize(8)
        axes.grid(alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    fire.Fire(main)
