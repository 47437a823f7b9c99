"""The tokenizer that is learnt from texts."""

import json
from pathlib import Path

import pytest

from data.chat import encode_chat
from data.chat_templates import CHAT_TEMPLATES
from data.tokenizer_training import END_OF_TEXT, train_tokenizer
from models.llama import load_tokenizer

TEXTS = ["Anna has 27 ropes. How many ropes does Anna have?\n27+35=62"] * 20
CHATML = dict(
    special_tokens=("<|im_start|>", "<|im_end|>"),
    plain_tokens=("<think>", "</think>"),
    eos_token="<|im_end|>",
    chat_template=CHAT_TEMPLATES["chatml"],
)


def test_any_text_comes_back(tmp_path: Path):
    train_tokenizer(TEXTS, tmp_path, vocab_size=400)
    tokenizer = load_tokenizer(tmp_path)
    for text in ("ropes Anna", "  two \n\n lines\t", "日本 Ää \N{MUSICAL SYMBOL G CLEF}", "\x00\x7f", "ropes." * 50):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_words_are_learnt_and_digits_stay_apart(tmp_path: Path):
    train_tokenizer(TEXTS, tmp_path, vocab_size=400)
    tokenizer = load_tokenizer(tmp_path)
    pieces = [tokenizer.token_bytes(i).decode() for i in tokenizer.encode("Anna has 27 ropes. 3507")]
    assert pieces == ["Anna", " has", " ", "2", "7", " ropes", ".", " ", "3", "5", "0", "7"]
    every = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    assert not [token for token in every if len(token) > 1 and any(b"0"[0] <= byte <= b"9"[0] for byte in token)]


def test_the_vocabulary_is_as_large_as_asked_or_as_the_texts_allow(tmp_path: Path):
    sizes = [train_tokenizer(TEXTS, tmp_path / str(n), vocab_size=n, **CHATML) for n in (261, 270, 5000)]
    assert sizes[:2] == [261, 270] and 270 < sizes[2] < 5000
    assert [load_tokenizer(tmp_path / name).vocab_size for name in ("261", "270", "5000")] == sizes


def test_added_tokens_are_single_and_only_special_ones_are_hidden(tmp_path: Path):
    train_tokenizer(TEXTS, tmp_path, vocab_size=300, **CHATML)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("<think>ropes</think>")
    assert tokenizer.decode(ids[:1]) == "<think>" and tokenizer.decode(ids[-1:]) == "</think>"
    assert tokenizer.decode(ids, skip_special=True) == "<think>ropes</think>"
    assert set(tokenizer.special_tokens) == {END_OF_TEXT, "<|im_start|>", "<|im_end|>"}
    assert tokenizer.stop_ids == {tokenizer.special_tokens["<|im_end|>"]} == {tokenizer.eos_id}
    assert len(tokenizer.encode("<|im_end|>")) > 1  # nobody forges a turn
    assert tokenizer.bos_id is None and tokenizer.pad_id == tokenizer.special_tokens[END_OF_TEXT]


def test_the_chat_template_is_the_tokenizers_own(tmp_path: Path):
    train_tokenizer(TEXTS, tmp_path, vocab_size=400, **CHATML)
    tokenizer = load_tokenizer(tmp_path)
    ids = encode_chat(tokenizer, [{"role": "user", "content": "ropes?"}], add_generation_prompt=True)
    assert tokenizer.decode(ids) == "<|im_start|>user\nropes?<|im_end|>\n<|im_start|>assistant\n"


def test_transformers_reads_the_files(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    train_tokenizer(TEXTS, tmp_path, vocab_size=400, **CHATML)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    text = "Anna has 27 ropes.\n<think>27+35</think> ä"
    assert theirs.encode(text) == ours.encode(text)
    assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", END_OF_TEXT)
    messages = [{"role": "user", "content": "ropes?"}]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == ours.decode(encode_chat(ours, messages, add_generation_prompt=True))


def test_the_same_texts_make_the_same_files(tmp_path: Path):
    for name in ("a", "b"):
        train_tokenizer(iter(TEXTS), tmp_path / name, vocab_size=300, **CHATML)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert files[0] == files[1] and set(files[0]) == {"tokenizer.json", "tokenizer_config.json"}
    assert json.loads(files[0]["tokenizer_config.json"])["chat_template"] == CHAT_TEMPLATES["chatml"]


def test_what_does_not_fit_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"vocab_size 260 has no room .* which are 261"):
        train_tokenizer(TEXTS, tmp_path, vocab_size=260, **CHATML)
    with pytest.raises(ValueError, match="eos_token '</s>' is none of"):
        train_tokenizer(TEXTS, tmp_path, vocab_size=300, eos_token="</s>")
    assert not list(tmp_path.iterdir())
