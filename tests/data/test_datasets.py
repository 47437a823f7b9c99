"""Data sets as settings name them: what is read, held out, packed, mixed and kept."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from data.characters import write_character_tokenizer
from data.datasets import DataConfig, Datasets, SourceConfig, open_datasets, texts
from models.llama import load_tokenizer
from utils.settings import load_settings

WORDS = "the cat sat on a mat"
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_character_tokenizer(["abcdefghijklmnopqrstuvwxyz :\n"], folder)
    return load_tokenizer(folder)


@pytest.fixture
def opened(tmp_path: Path, tokenizer):
    """open_datasets of a file of settings, whose `data` section is given as YAML."""

    def call(text: str, **options) -> Datasets:
        (tmp_path / "data.yaml").write_text(text.replace("HERE", str(tmp_path)))
        config = load_settings(DataConfig, tmp_path / "data.yaml")
        options = {
            "tokenizer_name": "characters",
            "template": None,
            "learn_all": False,
            "seed": 0,
            "cache_dir": tmp_path / "cache",
        } | options
        return open_datasets(config, tokenizer, **options)

    return call


def documents(rows) -> list[str]:
    """The texts of a store's documents."""
    letters = "\n :abcdefghijklmnopqrstuvwxyz"
    return ["".join(letters[token] for token in rows.store.document(i)[0]) for i in range(len(rows.store))]


def write_lines(path: Path, rows) -> None:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def test_every_format_of_files(tmp_path: Path, opened):
    (tmp_path / "a.txt").write_text("cat")
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    write_lines(tmp_path / "b.jsonl", [{"text": "dog"}])
    write_lines(tmp_path / "c.jsonl.gz", [{"text": "hen"}, {"text": "fox"}])
    (tmp_path / "d.json").write_text(json.dumps([{"text": "owl"}]))
    data = opened(
        """
        train: [HERE/a.txt, {path: HERE/lines.txt, unit: line}, HERE/b.jsonl, HERE/c.jsonl.gz, HERE/d.json]
        sequence_length: 8
        packing: none
        """
    )
    assert [documents(rows) for rows in data.train] == [["cat"], ["one", "two"], ["dog"], ["hen", "fox"], ["owl"]]
    assert data.report[3] == f"{tmp_path}/c.jsonl.gz: 2 documents, 6 tokens, 4 learnt" and data.validation == ()


def test_a_folder_of_parquet_as_data_sets_are_published(tmp_path: Path, opened):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    folder = tmp_path / "owner" / "data"
    folder.mkdir(parents=True)
    for number, text in enumerate(("cat", "dog")):
        pyarrow.parquet.write_table(
            pa.table({"text": [text, text * 2]}), folder / f"train-{number:05}-of-00002.parquet"
        )
    (tmp_path / "owner" / "README.md").write_text("no data")
    data = opened("{train: HERE/owner, sequence_length: 16, packing: best_fit}")
    assert documents(data.train[0]) == ["cat", "catcat", "dog", "dogdog"]
    data = opened("{train: HERE/owner/data/train-00001*, sequence_length: 16, packing: best_fit}")
    assert documents(data.train[0]) == ["dog", "dogdog"]


def test_token_files(tmp_path: Path, opened):
    np.arange(1, 21, dtype="<u2").tofile(tmp_path / "short.bin")
    np.arange(1, 21, dtype="<u4").tofile(tmp_path / "long.bin")
    data = opened(
        "{train: [HERE/short.bin, {path: HERE/long.bin, token_dtype: uint32}], sequence_length: 4, packing: concat}"
    )
    for rows in data.train:
        assert len(rows) == 5 and rows[1]["tokens"].tolist() == [5, 6, 7, 8] and rows[1]["targets"].tolist()[-1] == 9
    one = "{train: [{path: HERE/NAME, token_dtype: KIND}], sequence_length: 4, packing: concat}"
    with pytest.raises(ValueError, match=r"short\.bin: token \d is \d+, not below vocab_size 30; wrong dtype"):
        opened(one.replace("NAME", "short.bin").replace("KIND", "uint32"))
    (tmp_path / "a.txt").write_text("cat")
    with pytest.raises(ValueError, match=r"token_dtype 'uint16' is for \.bin files"):
        opened(one.replace("NAME", "a.txt").replace("KIND", "uint16"))
    for name, value in (("split", "train"), ("unit", "line"), ("format", "alpaca")):
        with pytest.raises(ValueError, match=rf"{name} '{value}' means nothing to .*short\.bin"):
            opened(one.replace("NAME", "short.bin").replace("token_dtype: KIND", f"{name}: {value}"))


def test_validation_is_a_part_of_its_own_or_files_of_its_own(tmp_path: Path, opened):
    write_lines(tmp_path / "rows.jsonl", [{"text": chr(97 + i) * 3} for i in range(20)])
    write_lines(tmp_path / "held.jsonl", [{"text": "zzz"}])
    base = "train: HERE/rows.jsonl\nsequence_length: 8\npacking: best_fit\n"
    data = opened(base + "validation_fraction: 0.25\n")
    kept = {documents(data.train[0])[i] for i in range(15)}
    held = {documents(data.validation[0])[i] for i in range(5)}
    assert len(kept) == 15 and len(held) == 5 and not kept & held
    assert {*documents(opened(base + "validation_fraction: 0.25\n", seed=1).validation[0])} != held
    data = opened(base + "validation: HERE/held.jsonl\n")
    assert documents(data.validation[0]) == ["zzz"] and len(data.train[0].store) == 20 and len(data.report) == 2
    with pytest.raises(ValueError, match="exclude each other"):
        opened(base + "validation: HERE/held.jsonl\nvalidation_fraction: 0.1\n")


def test_a_tail_of_one_text_is_held_out(tmp_path: Path, opened):
    (tmp_path / "a.txt").write_text(WORDS * 10)
    data = opened("{train: HERE/a.txt, validation_fraction: 0.1, sequence_length: 8, packing: concat}")
    assert documents(data.train[0])[0] + documents(data.validation[0])[0] == WORDS * 10


def test_weights_of_a_mixture():
    config = DataConfig(
        train=(SourceConfig(path="a", weight=2.0), "b", SourceConfig(path="c")), sequence_length=4, packing="none"
    )
    assert config.weights == (2.0, 1.0, 1.0)
    assert DataConfig(train=("a", "b"), sequence_length=4, packing="none").weights is None
    assert DataConfig(train="a", sequence_length=4, packing="none").train_sources == (SourceConfig(path="a"),)


def test_packings_and_what_is_too_long(tmp_path: Path, opened):
    write_lines(tmp_path / "rows.jsonl", [{"text": "a" * n} for n in (3, 5, 5, 12)])
    base = "train: HERE/rows.jsonl\nsequence_length: 8\npacking: "
    best, each, stream = (opened(base + name) for name in ("best_fit", "none", "concat"))
    assert [len(data.train[0]) for data in (best, each, stream)] == [3, 4, 3]
    assert best.report[0].endswith("; 1 cut to the length of a row") and "cut" not in stream.report[0]


def test_chats_are_learnt_where_the_assistant_speaks(tmp_path: Path, opened):
    turns = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}]
    write_lines(tmp_path / "chats.jsonl", [{"messages": turns}, {"messages": turns[:1]}])
    data = opened("{train: HERE/chats.jsonl, sequence_length: 64, packing: none}", template=CHAT)
    store = data.train[0].store
    tokens, mask = store.document(0)
    learnt = "".join("\n :abcdefghijklmnopqrstuvwxyz"[t] for t, m in zip(tokens, mask) if m)
    assert "dog" in learnt and "cat" not in learnt and len(store) == 1
    assert "1 dropped for want of anything to learn" in data.report[0]


@pytest.mark.parametrize("bad", ['{"text": 3}', "{", "[1]", '{"chosen": "a", "rejected": "b", "prompt": "c"}'])
def test_a_bad_row_in_the_middle(tmp_path: Path, opened, bad):
    (tmp_path / "rows.jsonl").write_text('{"text": "cat"}\n\n' + bad + '\n{"text": "dog"}\n')
    base = "train: HERE/rows.jsonl\nsequence_length: 8\npacking: best_fit\n"
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: "):
        opened(base)
    data = opened(base + "on_bad_row: skip\n")
    assert documents(data.train[0]) == ["cat", "dog"]
    assert f"1 bad rows skipped, the first {tmp_path}/rows.jsonl:3: " in data.report[0]


def test_tokens_are_kept_until_something_changes(tmp_path: Path, opened):
    path = tmp_path / "a.txt"
    path.write_text("cat")
    text = "{train: HERE/a.txt, sequence_length: 8, packing: best_fit}"

    def kept() -> int:
        return len(list((tmp_path / "cache").iterdir()))

    first = opened(text).train[0].fingerprint
    assert opened(text).train[0].fingerprint == first and kept() == 1
    opened(text, tokenizer_name="another")
    opened(text.replace("length: 8", "length: 9"))
    assert kept() == 3
    opened("{train: [{path: HERE/a.txt, weight: 3}], sequence_length: 8, packing: best_fit}")
    assert kept() == 3  # a weight is none of the tokens' business
    path.write_text("cats")
    assert opened(text).train[0].fingerprint != first and kept() == 4


def test_nothing_to_learn(tmp_path: Path, opened):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "b.txt").write_text("a")
    for name, error in (("a.txt", "is empty"), ("empty", "no data in the folder"), ("b.txt", "b.txt: ")):
        with pytest.raises(ValueError, match=error):
            opened(f"{{train: HERE/{name}, sequence_length: 8, packing: best_fit}}")
    with pytest.raises(FileNotFoundError, match="no such file, folder or data set: nowhere"):
        opened("{train: nowhere, sequence_length: 8, packing: best_fit}")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"train": ()}, "train names no data set"),
        ({"train": ""}, "train names no data set"),
        ({"sequence_length": 0}, "sequence_length must be positive, not 0"),
        ({"packing": "tight"}, "packing 'tight' is none of best_fit, concat, none"),
        ({"validation_fraction": 1.0}, "validation_fraction 1.0 must be at least 0 and below 1"),
        (
            {"validation": (SourceConfig(path="b", weight=2.0),)},
            "the weight 2.0 of b is for training, not for validation",
        ),
    ],
)
def test_settings_that_cannot_be(changes, error):
    with pytest.raises(ValueError, match=error):
        DataConfig(**({"train": "a", "sequence_length": 4, "packing": "none"} | changes))


def test_sources_that_cannot_be():
    with pytest.raises(ValueError, match="the path of a data set is empty"):
        SourceConfig(path="")
    with pytest.raises(ValueError, match=r"the weight 0\.0 of a must be positive"):
        SourceConfig(path="a", weight=0.0)


def test_texts_are_of_plain_text_alone(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", [{"text": "cat"}, {"text": 3}, {"text": "dog"}])
    sources = (SourceConfig(path=str(tmp_path / "a.jsonl")),)
    assert list(texts(sources, skip_bad=True)) == ["cat", "dog"]
    with pytest.raises(ValueError, match=r"a\.jsonl:2: "):
        list(texts(sources))
    write_lines(tmp_path / "a.jsonl", [{"prompt": "cat", "completion": "dog"}])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: a character tokenizer is made of plain text alone"):
        list(texts(sources, skip_bad=True))


def test_a_pattern_of_token_files_shares_its_weight_by_tokens(tmp_path: Path, opened):
    np.arange(1, 21, dtype="<u2").tofile(tmp_path / "a.bin")
    np.tile(np.arange(1, 21, dtype="<u2"), 3).tofile(tmp_path / "b.bin")
    data = opened("{train: [{path: HERE/*.bin, weight: 2}], sequence_length: 4, packing: concat}")
    assert [len(rows) for rows in data.train] == [5, 15] and data.weights == (0.5, 1.5)
    assert opened("{train: HERE/*.bin, sequence_length: 4, packing: concat}").weights is None


def test_tokens_in_the_cache_are_opened_without_their_rows(tmp_path: Path, opened, monkeypatch):
    write_lines(tmp_path / "rows.jsonl", [{"text": "abc"}, {"text": "de"}])
    settings = "train: HERE/rows.jsonl\nsequence_length: 8\npacking: best_fit\n"
    first = opened(settings)
    monkeypatch.setattr("data.datasets.open_rows", lambda *_, **__: pytest.fail("the rows were opened"))
    assert opened(settings).train[0].fingerprint == first.train[0].fingerprint
    monkeypatch.undo()
    write_lines(tmp_path / "rows.jsonl", [{"text": "abc"}, {"text": "def"}])
    assert opened(settings).train[0].fingerprint != first.train[0].fingerprint


def test_pretraining_learns_prompts_too(tmp_path: Path, opened):
    write_lines(tmp_path / "rows.jsonl", [{"prompt": "ab", "completion": "cde"}])
    settings = "train: HERE/rows.jsonl\nsequence_length: 4\npacking: none\n"
    assert opened(settings).train[0][0]["weights"].tolist() == [0, 1, 1, 1]
    assert opened(settings, learn_all=True).train[0][0]["weights"].tolist() == [1, 1, 1, 1]
