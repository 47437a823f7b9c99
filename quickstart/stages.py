"""The stages of the quickstart, each a command that can also be typed, and what of them is done already.

A stage is done when its last file is there: files and folders appear under their names in one move. So whatever ended
the program, the next one goes on with the stage that was under way, and train.py with its newest checkpoint.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quickstart.corpus import Sizes, write_corpus, write_tokenizer
from utils.settings import load_settings

TRAINED = ("pretrain", "sft", "grpo")
_TITLES = {
    "pretrain": "pretraining on plain text, from random weights",
    "sft": "supervised fine-tuning on answers in a chat",
    "grpo": "reinforcement learning (GRPO) on the answer's correctness alone",
}
_MOST_TOKENS = 64  # of an answer


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """A quickstart in its folder. Raises ValueError for a folder that holds one of another seed."""

    output: Path
    seed: int
    recipes: Path

    def __post_init__(self) -> None:
        record = self.output / "seed.json"
        if not record.exists():
            if self.output.is_dir() and any(self.output.iterdir()):
                raise ValueError(f"{self.output} holds something else: give another --output")
            self.output.mkdir(parents=True, exist_ok=True)
            _write(record, self.seed)
        elif (seed := json.loads(record.read_text())) != self.seed:
            raise ValueError(f"{self.output} holds the quickstart of --seed {seed}: give another --output")

    def go(self) -> None:
        """Do what is not done yet. SystemExit ends it where a command was interrupted or failed."""
        self._make("corpus", "writing problems to learn from", self._write_corpus)
        self._make("tokenizer", "training a tokenizer on them", self._train_tokenizer)
        for stage in TRAINED:
            self._train(stage)
            self._judge(stage)

    def _make(self, name: str, title: str, make: Callable[[Path], None]) -> None:
        """Make a folder, in one move."""
        if (self.output / name).exists():
            return
        _say(title)
        started = time.perf_counter()
        partial = self.output / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        make(partial)
        partial.rename(self.output / name)
        self._count(name, time.perf_counter() - started)

    def _write_corpus(self, folder: Path) -> None:
        write_corpus(folder, seed=self.seed, sizes=load_settings(Sizes, self.recipes / "corpus.yaml"))

    def _train_tokenizer(self, folder: Path) -> None:
        write_tokenizer(self.output / "corpus", folder)

    def _train(self, stage: str) -> None:
        """Train by train.py, from its newest checkpoint if there is one."""
        if (self.output / stage / "hf" / "config.json").exists():
            return
        _say(_TITLES[stage])
        place = {
            "output_dir": self.output / stage,
            "data.train": self.output / "corpus" / f"{stage}.jsonl",
            "data.cache_dir": self.output / "tokens",
            "trainer.seed": self.seed,
        }
        if stage == "pretrain":
            place["tokenizer"] = self.output / "tokenizer"
        else:
            place["model.checkpoint"] = self.output / TRAINED[TRAINED.index(stage) - 1] / "hf"
        if stage == "grpo":
            del place["data.cache_dir"]
        flags = [f"--{key}={value}" for key, value in place.items()]
        self._run(stage, ["train", stage, "--config", str(self.recipes / f"{stage}.yaml"), *flags, "--resume"])

    def _judge(self, stage: str) -> None:
        """Answer the held-out problems by generate.py, each token the likeliest."""
        answers = self.output / f"answers_{stage}.jsonl"
        if answers.exists():
            return
        partial = answers.with_name(f"{answers.name}.partial")
        flags = {
            "ckpt_dir": self.output / stage / "hf",
            "prompts_file": self.output / "corpus" / "held_out.jsonl",
            "output": partial,
            "temperature": 0,
            "max_new_tokens": _MOST_TOKENS,
            "batch_size": 128,
        }
        self._run("judging", ["generate", *(f"--{key}={value}" for key, value in flags.items())])
        os.replace(partial, answers)

    def _run(self, name: str, command: Sequence[str]) -> None:
        """Run one of our programs; interrupts are its own to answer."""
        started = time.perf_counter()
        code = run_program([sys.executable, "-m", *command])
        self._count(name, time.perf_counter() - started)
        if code:
            if code in (130, 143) or code < 0:
                _say("interrupted: the same command goes on from here")
            raise SystemExit(code if code > 0 else 128 - code)

    def _count(self, name: str, seconds: float) -> None:
        """Add to the seconds that something has taken."""
        path = self.output / "seconds.json"
        counted = json.loads(path.read_text()) if path.exists() else {}
        _write(path, counted | {name: round(counted.get(name, 0) + seconds, 2)})


def run_program(command: Sequence[str]) -> int:
    """The exit code of a program; a signal's number below zero where one ended it.

    Meanwhile Ctrl-C is left to the program, which the terminal tells too, and SIGTERM is passed on to it.
    """
    process: subprocess.Popen | None = None

    def pass_on(number: int, frame: object) -> None:
        if process is not None:
            process.send_signal(number)

    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
    }
    try:
        process = subprocess.Popen(command)
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write(path: Path, value: object) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _say(line: str) -> None:
    print(f"\n== {line}", file=sys.stderr, flush=True)
