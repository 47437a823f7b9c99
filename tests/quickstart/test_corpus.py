"""The files of the quickstart: what may not be in them, and that the tokenizer reads numbers digit by digit."""

import itertools
import json
import re
from pathlib import Path

import pytest

from models.llama import load_tokenizer
from quickstart.corpus import Sizes, write_corpus, write_tokenizer
from quickstart.problems import held_out

SIZES = Sizes(pretrain=3000, sft=500, grpo=500, held_out=300)
LEARNT = ("pretrain", "sft", "grpo")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, seed=1, sizes=SIZES)
    return folder


def rows(corpus: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (corpus / f"{name}.jsonl").read_text().splitlines()]


def texts(corpus: Path, name: str) -> list[str]:
    """All the words of each row."""
    return [
        row["text"] if "text" in row else "\n".join(m["content"] for m in row.get("messages") or row["prompt"])
        for row in rows(corpus, name)
    ]


def operations(text: str) -> set[tuple[int, int]]:
    """Pairs of neighbours in all that is added, taken and multiplied in a text."""
    chains = [re.split(r"[-+*]", chain) for chain in re.findall(r"\d+(?:[-+*]\d+)+", text)]
    return {(int(a), int(b)) for chain in chains for a, b in itertools.pairwise(chain)}


def stated(text: str) -> set[tuple[int, int]]:
    """Pairs of numbers of one question."""
    questions = re.findall(r"[^\n]*\?", text)
    return {
        (int(a), int(b)) for question in questions for a, b in itertools.combinations(re.findall(r"\d+", question), 2)
    }


@pytest.mark.parametrize("stage", LEARNT)
def test_no_stage_learns_from_a_held_out_pair(corpus, stage):
    pairs = set().union(*(operations(text) | stated(text) for text in texts(corpus, stage)))
    assert len(pairs) > 200
    assert not [pair for pair in pairs if held_out(*pair)]


def test_combinations_of_held_out_problems_are_nowhere_else(corpus):
    """By the texts alone, whatever the hash says: no pair of numbers of a held-out question is in training."""
    learnt = set().union(*(operations(text) | stated(text) for name in LEARNT for text in texts(corpus, name)))
    learnt |= {(b, a) for a, b in learnt}
    for text in texts(corpus, "held_out"):
        first = next(iter(itertools.pairwise(map(int, re.findall(r"\d+", text)))))
        assert first not in learnt, text


def test_held_out_problems_are_of_pairs_of_their_own_and_the_same_for_all_seeds(corpus, tmp_path):
    write_corpus(tmp_path, seed=2, sizes=SIZES)
    assert (tmp_path / "held_out.jsonl").read_bytes() == (corpus / "held_out.jsonl").read_bytes()
    for name in LEARNT:
        assert (tmp_path / f"{name}.jsonl").read_bytes() != (corpus / f"{name}.jsonl").read_bytes()


def test_the_seed_makes_the_same_files(corpus, tmp_path):
    write_corpus(tmp_path, seed=1, sizes=SIZES)
    for path in corpus.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_rows_are_as_the_stages_read_them(corpus):
    assert [len(rows(corpus, name)) for name in (*LEARNT, "held_out")] == [3000, 500, 500, 300]
    user, assistant = rows(corpus, "sft")[0]["messages"]
    assert user["role"] == "user" and re.fullmatch(r"<think>\n.*\n</think>\n\d+", assistant["content"], re.DOTALL)
    assert set(rows(corpus, "grpo")[0]) == {"prompt", "answer"} and rows(corpus, "grpo")[0]["answer"].isdecimal()
    assert set(rows(corpus, "held_out")[0]) == {"messages", "answer", "family"}


def test_words_are_tokens_and_questions_and_answers_are_short(corpus, tmp_path):
    assert write_tokenizer(corpus, tmp_path) <= 576
    tokenizer = load_tokenizer(tmp_path)
    lengths = {
        role: max(len(tokenizer.encode(row["messages"][place]["content"])) for row in rows(corpus, "sft"))
        for place, role in enumerate(("user", "assistant"))
    }
    assert lengths["user"] < 48 and lengths["assistant"] < 64
    words = tokenizer.encode("user\nassistant\nAnna has 27 apples. How many apples does Anna have now?")
    assert len(words) == 19
