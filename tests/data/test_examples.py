"""Records to tokens: what is learnt, what stands at the ends, and whole data sets on the way to batches."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from data.chat import choose_template, encode_chat
from data.examples import Example, tokenize
from data.loading import Loader
from data.packing import best_fit, concat
from data.readers import open_rows
from data.records import ChatRecord, CompletionRecord, PreferenceRecord, TextRecord, normalize
from data.store import split
from data.store_build import build, open_or_build, store_key
from models.llama.tokenizer import load_tokenizer


@dataclass
class Letters:
    """A tokenizer of letters, where `ab` is one token, that can put a space in front of whole texts."""

    bos_id: int | None = 1
    eos_id: int | None = 2
    adds_bos: bool = True
    space: str = ""

    def encode(self, text, *, add_bos=False, allow_special=False):
        assert not add_bos and not allow_special
        text = self.space + text if text else text
        return [3 if letter == "§" else ord(letter) for letter in text.replace("ab", "§")]


def unpacked(example):
    assert isinstance(example, Example)
    assert example.tokens.dtype == np.int32 and example.mask.dtype == bool
    assert example.tokens.shape == example.mask.shape
    return example.tokens.tolist(), example.mask.tolist()


def ids(text):
    return [ord(letter) for letter in text]


@pytest.mark.parametrize(
    "tokenizer,front,behind",
    [
        (Letters(), [1], [2]),
        (Letters(adds_bos=False), [], [2]),
        (Letters(bos_id=None, adds_bos=False, eos_id=None), [], []),
        (Letters(eos_id=0), [1], [0]),
    ],
)
def test_texts_have_their_ends_by_convention(tokenizer, front, behind):
    tokens, mask = unpacked(tokenize(TextRecord(text="xy"), tokenizer))
    assert tokens == [*front, *ids("xy"), *behind] and all(mask)
    tokens, mask = unpacked(tokenize(CompletionRecord(prompt="x", completion="yz"), tokenizer))
    assert tokens == [*front, *ids("xyz"), *behind]
    assert mask == [False] * (len(front) + 1) + [True] * (2 + len(behind))


def test_pieces_have_the_ends_of_their_text():
    flags = [(True, False), (False, False), (False, True)]
    pieces = [tokenize(TextRecord(text=" x", first=first, last=last), Letters(space=" ")) for first, last in flags]
    assert [piece.tokens.tolist() for piece in pieces] == [[1, *ids("  x")], ids(" x"), [*ids(" x"), 2]]
    assert [piece.last for piece in pieces] == [False, False, True]


@pytest.mark.parametrize("space", ["", " "])
def test_a_completion_goes_on_from_its_prompt(space):
    record = CompletionRecord(prompt="x", completion="y")
    assert tokenize(record, Letters(space=space)).tokens.tolist() == [1, *ids(f"{space}xy"), 2]
    record = CompletionRecord(prompt="xa", completion="by")  # `ab` must not be joined across: a prompt ends with `a`
    tokens, mask = unpacked(tokenize(record, Letters(space=space)))
    assert tokens == [1, *ids(f"{space}xaby"), 2]
    assert mask == [False] * (3 + len(space)) + [True] * 3


def test_a_completion_without_a_prompt_is_a_text():
    tokens, mask = unpacked(tokenize(CompletionRecord(prompt="", completion="xy"), Letters(space=" ")))
    assert tokens == [1, *ids(" xy"), 2] and mask == [False, True, True, True, True]


def test_names_of_special_tokens_are_plain_text(assets_dir):
    tokenizer = load_tokenizer(assets_dir / "tokenizers" / "llama3")
    text = "a<|eot_id|>"
    for record in (TextRecord(text=text), CompletionRecord(prompt=text, completion=text)):
        inner = tokenize(record, tokenizer).tokens[1:-1]
        assert inner.max() < 128_000


@pytest.mark.parametrize("folder", ["stories260k/hf", "stories260k/meta", "tokenizers/llama3", "tokenizers/gpt2"])
def test_completions_of_real_tokenizers_read_as_the_text(assets_dir, folder):
    tokenizer = load_tokenizer(assets_dir / folder)
    for prompt, completion in (("Once upon", " a time"), ("Sum:\n", "4\n"), ("a ", "b"), ("wor", "ld"), ("", "x")):
        example = tokenize(CompletionRecord(prompt=prompt, completion=completion), tokenizer)
        text = tokenizer.decode(example.tokens, skip_special=True)
        assert text == prompt + completion
        learnt = tokenizer.decode(example.tokens[example.mask], skip_special=True, continuation=bool(prompt))
        assert learnt == completion
        head = tokenizer.encode(prompt, add_bos=tokenizer.adds_bos)
        assert example.tokens[: len(head)].tolist() == head and not example.mask[: len(head)].any()
        assert (tokenizer.eos_id is None) or example.tokens[-1] == tokenizer.eos_id


def test_chats_are_encoded_with_their_mask(assets_dir):
    tokenizer = load_tokenizer(assets_dir / "stories260k" / "hf")
    template = choose_template(tokenizer, "qa")
    roles = ("user", "assistant", "user", "assistant")
    messages = tuple({"role": role, "content": text} for role, text in zip(roles, ("Hi", "Ho", "Why", "So")))
    record = ChatRecord(messages=messages)
    example = tokenize(record, tokenizer, template=template)
    unpacked(example)
    assert example.tokens.tolist() == encode_chat(tokenizer, messages, template=template)
    learnt = tokenizer.decode(example.tokens[example.mask], continuation=True)
    assert "Ho" in learnt and "So" in learnt and "Hi" not in learnt and "Question" not in learnt
    later = tokenize(replace(record, learn_from=2), tokenizer, template=template)
    assert later.tokens.tolist() == example.tokens.tolist()
    assert "Ho" not in (text := tokenizer.decode(later.tokens[later.mask], continuation=True)) and "So" in text


def test_tools_reach_the_template(assets_dir):
    tokenizer = load_tokenizer(assets_dir / "stories260k" / "hf")
    tool = {"type": "function", "function": {"name": "look", "description": "", "parameters": {"type": "object"}}}
    messages = tuple({"role": role, "content": "x"} for role in ("user", "assistant"))
    with pytest.raises(ValueError, match="no place for tools"):
        tokenize(ChatRecord(messages=messages, tools=(tool,)), tokenizer, template=choose_template(tokenizer, "qa"))


def test_preferences_are_refused():
    with pytest.raises(ValueError, match="chosen and rejected"):
        tokenize(PreferenceRecord(prompt="a", chosen="b", rejected="c"), Letters())
    with pytest.raises(TypeError, match="got str"):
        tokenize("text", Letters())


def test_tiny_shakespeare_to_batches(assets_dir, tmp_path):
    path = assets_dir / "data" / "tinyshakespeare" / "input.txt"
    tokenizer = load_tokenizer(assets_dir / "stories260k" / "hf")
    store = build(
        open_rows(path),
        tokenize=lambda row: tokenize(normalize(row), tokenizer),
        folder=tmp_path / "s",
        vocab_size=tokenizer.vocab_size,
    )
    assert len(store) == 1 and store.mask is None
    text = path.read_text(encoding="utf-8")
    tokens = store.document(0)[0]
    assert (tokens[0], tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer.decode(tokens[1:-1]) == text
    kept, held = split(store, 0.05, seed=0)
    assert kept.num_tokens + held.num_tokens == len(tokens)
    rows = concat(kept, 256)
    assert rows.efficiency > 0.999
    learnt = sum(int(batch.weights_BT.sum()) for batch in Loader([rows], batch_size=64, num_epochs=1))
    assert learnt == kept.num_tokens - 1


def test_alpaca_to_batches(assets_dir, tmp_path):
    path = assets_dir / "data" / "llamafactory" / "alpaca_en_demo.json"
    tokenizer = load_tokenizer(assets_dir / "stories260k" / "hf")
    template = choose_template(tokenizer, "qa")
    key = store_key([path], tokenizer="stories260k", template=template, max_length=513)
    options = {
        "tokenize": lambda row: tokenize(normalize(row), tokenizer, template=template),
        "vocab_size": tokenizer.vocab_size,
        "max_length": 513,
    }
    store = open_or_build(tmp_path, key, lambda: open_rows(path), **options)
    counts = store.counts
    assert counts.rows == 999 == counts.documents + counts.dropped_empty and not counts.skipped_bad
    assert 0 < counts.truncated < 500 and counts.learnt_tokens < counts.tokens
    first = json.loads(path.read_text(encoding="utf-8"))[0]
    tokens, mask = store.document(0)
    assert first["instruction"] in tokenizer.decode(tokens)
    assert tokenizer.decode(tokens[mask], continuation=True).lstrip().startswith(first["output"][:40].strip())
    rows = best_fit(store, 512)
    assert rows.efficiency > 0.97
    learnt = sum(int(batch.weights_BT.sum()) for batch in Loader([rows], batch_size=8, num_epochs=1))
    assert learnt == counts.learnt_tokens
