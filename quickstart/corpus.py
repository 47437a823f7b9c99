"""What the stages learn from and are judged by, as files, drawn from a seed; and the tokenizer of their text."""

import json
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.chat_templates import CHAT_TEMPLATES
from data.tokenizer_training import train_tokenizer
from quickstart.problems import Problem, draw_operation, draw_problem

VOCABULARY = 576
_TOKENIZER_DOCUMENTS = 4000
_SUMS_IN_A_DOCUMENT = 3


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Documents to pretrain on, answers to imitate, questions to practise, and questions held out."""

    pretrain: int = 30_000
    sft: int = 1_000
    grpo: int = 4_000
    held_out: int = 512


def write_corpus(folder: Path, *, seed: int, sizes: Sizes) -> None:
    """Write pretrain.jsonl, sft.jsonl, grpo.jsonl and held_out.jsonl; the last is the same for every seed."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        "pretrain": ({"text": text} for text in documents(_rng(seed, "pretrain"), sizes.pretrain)),
        "sft": ({"messages": [asked(p), answered(p)]} for p in problems(_rng(seed, "sft"), sizes.sft)),
        "grpo": ({"prompt": [asked(p)], "answer": str(p.answer)} for p in problems(_rng(seed, "grpo"), sizes.grpo)),
        "held_out": (
            {"messages": [asked(p)], "answer": str(p.answer), "family": p.family}
            for p in problems(_rng(0, "held out"), sizes.held_out, held=True)
        ),
    }
    for name, own in rows.items():
        _write_lines(folder / f"{name}.jsonl", own)


def write_tokenizer(corpus: Path, folder: Path) -> int:
    """Train a tokenizer on the text of a corpus; returns its vocabulary. <think> and </think> are single tokens."""
    with open(corpus / "pretrain.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(_TOKENIZER_DOCUMENTS))]
    return train_tokenizer(
        [*texts, *["user\nassistant\n"] * 100],
        folder,
        vocab_size=VOCABULARY,
        special_tokens=("<|im_start|>", "<|im_end|>"),
        plain_tokens=("<think>", "</think>"),
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATES["chatml"],
    )


def documents(rng: random.Random, count: int) -> Iterator[str]:
    """Plain text: word problems with their working and answer, and sums among them."""
    for _ in range(count):
        if rng.random() < 0.3:
            sums = (draw_operation(rng) for _ in range(_SUMS_IN_A_DOCUMENT))
            yield "\n\n".join(f"{own.worked()}\n{own.result}" for own in sums)
        else:
            problem = draw_problem(rng, held=False)
            yield f"{problem.question}\n{problem.steps}\n{problem.answer}"


def problems(rng: random.Random, count: int, *, held: bool = False) -> Iterator[Problem]:
    for _ in range(count):
        yield draw_problem(rng, held=held)


def asked(problem: Problem) -> dict[str, str]:
    return {"role": "user", "content": problem.question}


def answered(problem: Problem) -> dict[str, str]:
    return {"role": "assistant", "content": f"<think>\n{problem.steps}\n</think>\n{problem.answer}"}


def _rng(seed: int, name: str) -> random.Random:
    return random.Random(f"{seed} {name}")


def _write_lines(path: Path, rows: Iterator[Mapping[str, Any]]) -> None:
    """In one move, so that a file is whole or not there."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    os.replace(partial, path)
