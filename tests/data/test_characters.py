"""The tokenizer of a text's characters."""

from pathlib import Path

from data.characters import UNKNOWN, write_character_tokenizer
from models.llama import load_tokenizer

TEXTS = ("Bä \n\n  c\t", "日本\N{MUSICAL SYMBOL G CLEF}e\u0301 <s> ▁▁")


def test_texts_come_back_character_by_character(tmp_path: Path):
    write_character_tokenizer(TEXTS, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == len({*"".join(TEXTS), UNKNOWN})
    assert tokenizer.bos_id is None and tokenizer.eos_id is None and not tokenizer.adds_bos


def test_ids_are_in_the_order_of_code_points(tmp_path: Path):
    write_character_tokenizer(["cab"], tmp_path)
    assert load_tokenizer(tmp_path).encode("abc") == [0, 1, 2]


def test_other_characters_are_one_token(tmp_path: Path):
    write_character_tokenizer(["ab"], tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("axyb")
    assert ids == [0, 2, 2, 1] and tokenizer.decode(ids) == f"a{UNKNOWN}{UNKNOWN}b"


def test_a_long_text_is_one_word(tmp_path: Path):
    """Long runs without a space cost no more than their length."""
    write_character_tokenizer(["ab"], tmp_path)
    assert len(load_tokenizer(tmp_path).encode("ab" * 200_000)) == 400_000


def test_writing_again_replaces_it_whole(tmp_path: Path):
    write_character_tokenizer(["ab"], tmp_path / "new")
    write_character_tokenizer(["abc"], tmp_path / "new")
    assert load_tokenizer(tmp_path / "new").vocab_size == 4
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokenizer.json"]
