"""Token stores: what goes in comes out, in little memory, whole or not at all."""

import dataclasses
import json
import multiprocessing
import os
import signal
import time
import tracemalloc

import numpy as np
import pytest

from data.examples import Example
from data.records import BadRow
from data.store import Counts, TokenStore, open_bin, split
from data.store_build import build, open_or_build, store_key


def example(tokens, mask=None, *, last=True):
    tokens = np.array(tokens, np.int32)
    return Example(tokens, np.ones(len(tokens), bool) if mask is None else np.array(mask, bool), last)


def same(row):
    return row


def make(folder, examples, **options):
    return build(examples, **{"tokenize": same, "folder": folder, "vocab_size": 1000} | options)


def documents(store):
    return [(tokens.tolist(), mask.tolist()) for tokens, mask in map(store.document, range(len(store)))]


@pytest.mark.parametrize("vocab_size,dtype", [(65536, np.uint16), (65537, np.uint32)])
def test_random_documents_come_back(tmp_path, vocab_size, dtype):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, vocab_size, size) for size in rng.integers(2, 50, 300)]
    rows = [example([*row, vocab_size - 1], [*(rng.random(len(row)) < 0.5), True]) for row in rows]
    store = make(tmp_path / "s", rows, vocab_size=vocab_size)
    assert store.tokens.dtype == dtype
    assert documents(store) == [(row.tokens.tolist(), row.mask.tolist()) for row in rows]
    assert store.read(0, 5)[0].dtype == np.int32 and store.read(0, 5)[1].dtype == bool
    total = sum(len(row.tokens) for row in rows)
    learnt = sum(int(row.mask[1:].sum()) for row in rows)
    assert store.counts == Counts(rows=300, documents=300, tokens=total, learnt_tokens=learnt)
    again = TokenStore.open(tmp_path / "s")
    assert documents(again) == documents(store) and again.fingerprint == store.fingerprint


def test_the_mask_is_left_out_where_all_is_learnt(tmp_path):
    assert make(tmp_path / "a", [example([1, 2])]).mask is None
    assert not (tmp_path / "a" / "mask.bin").exists()
    store = make(tmp_path / "b", [example([1, 2]), example([1, 2, 3], [1, 0, 1]), example([4, 5])])
    assert documents(store) == [([1, 2], [True, True]), ([1, 2, 3], [True, False, True]), ([4, 5], [True, True])]


def test_documents_are_cut_dropped_and_counted(tmp_path):
    rows = [
        example([1, 2, 3, 4]),
        example([1, 2, 3, 4, 5]),  # cut
        example([1, 2, 3, 4, 5], [0, 0, 0, 0, 1]),  # nothing is left of it
        example([1, 2], [1, 0]),  # nobody predicts the first token
        example([7]),
        example([]),
        example([1, 2, 3, 4, 9], [0, 0, 0, 1, 1]),
    ]
    store = make(tmp_path / "s", rows, max_length=4)
    assert [tokens for tokens, _ in documents(store)] == [[1, 2, 3, 4]] * 3
    assert store.counts == Counts(rows=7, documents=3, tokens=12, learnt_tokens=7, dropped_empty=4, truncated=2)


def test_pieces_become_one_document(tmp_path):
    rows = [
        *(example(tokens, last=False) for tokens in ([], [1], [2, 3], [], [4])),
        example([5]),
        example([6, 7]),
        example([8], last=False),
        example([]),  # with the 8 before it nothing to learn
        *(example([9] * 4, last=False) for _ in range(3)),  # the end is missing
    ]
    store = make(tmp_path / "s", rows, max_length=10)
    assert [tokens for tokens, _ in documents(store)] == [[1, 2, 3, 4, 5], [6, 7], [9] * 10]
    assert store.counts == Counts(rows=12, documents=3, tokens=17, learnt_tokens=14, dropped_empty=1, truncated=1)


class PlacedRows:
    """Rows by index: even ones are read, of the odd ones every second fails in reading, and every second later."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index % 4 == 1:
            raise BadRow(f"a.jsonl:{index + 1}: unreadable")
        return index

    def where(self, index):
        return f"a.jsonl:{index + 1}"


class ReadableRows(PlacedRows):
    def __getitem__(self, index):
        return index


def refusing(index):
    if index % 4 == 3:
        raise ValueError("no chat")
    return example([index, index])


def test_bad_rows_are_an_error_or_counted(tmp_path):
    with pytest.raises(ValueError, match=r"^a.jsonl:2: unreadable$"):
        make(tmp_path / "s", PlacedRows(), tokenize=refusing)
    assert list(tmp_path.iterdir()) == []
    store = make(tmp_path / "s", PlacedRows(), tokenize=refusing, skip_bad=True)
    assert [tokens[0] for tokens, _ in documents(store)] == [0, 2, 4, 6]
    assert (store.counts.rows, store.counts.skipped_bad) == (8, 4)
    assert store.counts.first_bad == "a.jsonl:2: unreadable"
    with pytest.raises(ValueError, match=r"^a.jsonl:4: no chat$"):
        make(tmp_path / "t", ReadableRows(), tokenize=refusing)


def test_an_empty_data_set_says_where_its_rows_went(tmp_path):
    with pytest.raises(ValueError, match=r"my.jsonl: nothing to learn: 0 rows$"):
        make(tmp_path / "s", [], name="my.jsonl")
    rows = iter([3, example([1]), example([1, 2], [1, 0])])
    message = (
        r"my.jsonl: nothing to learn: 3 rows, 2 without a token to learn.*, 1 bad, the first of them row 0: no chat$"
    )
    with pytest.raises(ValueError, match=message):
        make(
            tmp_path / "s",
            rows,
            name="my.jsonl",
            skip_bad=True,
            tokenize=lambda row: refusing(row) if row == 3 else row,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tokens", [[1, 1000], [-1, 2]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, tokens):
    with pytest.raises(ValueError, match="the vocabulary has 1000"):
        make(tmp_path / "s", [example(tokens)], skip_bad=True)
    with pytest.raises(ValueError, match="max_length 1"):
        make(tmp_path / "s", [example([1, 2])], max_length=1)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_source_leaves_nothing(tmp_path):
    def rows():
        yield example([1, 2])
        raise OSError("cable pulled")

    with pytest.raises(OSError, match="cable pulled"):
        make(tmp_path / "s", rows())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_surfaces_and_leaves_nothing(tmp_path):
    import resource

    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 21, 1 << 21))
        try:
            make(tmp_path / "s", (example(np.arange(1000)) for _ in range(10_000)))
        except OSError:
            os._exit(7)
        os._exit(0)

    assert run(child) == 7
    assert list(tmp_path.iterdir()) == []


def run(target):
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join()
    return process.exitcode


def test_a_killed_build_looks_unfinished_and_the_next_one_builds(tmp_path):
    def rows():
        yield from (example(np.arange(1000)) for _ in range(3000))
        os.kill(os.getpid(), signal.SIGKILL)

    assert run(lambda: open_or_build(tmp_path, "key", rows, tokenize=same, vocab_size=1000)) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".")
    store = open_or_build(tmp_path, "key", lambda: [example([1, 2])], tokenize=same, vocab_size=1000)
    assert documents(store) == [([1, 2], [True, True])]
    assert [path.name for path in tmp_path.iterdir()] == ["key"], "what was left has been removed"
    assert sorted(path.name for path in (tmp_path / "key").iterdir()) == ["meta.json", "offsets.bin", "tokens.bin"]


def test_processes_that_build_at_once_agree(tmp_path):
    def rows():
        for index in range(200):
            time.sleep(0.001)
            yield example([index, index + 1])

    def child():
        store = open_or_build(tmp_path, "key", rows, tokenize=same, vocab_size=1000)
        os._exit(len(store) == 200)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=child) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [1, 1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_built_store_is_opened_without_its_rows(tmp_path):
    options = {"tokenize": same, "vocab_size": 1000, "name": "mine"}
    first = open_or_build(tmp_path / "deep" / "cache", "key", lambda: [example([1, 2])], **options)
    again = open_or_build(tmp_path / "deep" / "cache", "key", lambda: pytest.fail("read again"), **options)
    assert documents(again) == documents(first) and again.name == "mine"


def test_another_store_is_not_overwritten(tmp_path):
    make(tmp_path / "s", [example([1, 2])])
    make(tmp_path / "s", [example([1, 2])])
    with pytest.raises(ValueError, match="holds another data set's tokens"):
        make(tmp_path / "s", [example([1, 3])])
    assert documents(TokenStore.open(tmp_path / "s")) == [([1, 2], [True, True])]
    assert len(list(tmp_path.iterdir())) == 1


def test_fingerprints_are_of_the_content(tmp_path):
    rows = [example([1, 2, 3]), example([4, 5])]
    variants = {
        "same": rows,
        "pieces": [example([1], last=False), example([2, 3]), example([4, 5])],
        "tokens": [example([1, 2, 3]), example([4, 6])],
        "bounds": [example([1, 2]), example([3, 4, 5])],
        "mask": [example([1, 2, 3], [0, 1, 1]), example([4, 5])],
    }
    found = {name: make(tmp_path / name, variant).fingerprint for name, variant in variants.items()}
    assert found["same"] == found["pieces"]
    assert len(set(found.values())) == 4


def test_a_damaged_store_is_refused(tmp_path):
    make(tmp_path / "s", [example([1, 2, 3], [0, 1, 0])])
    for name in ("tokens.bin", "mask.bin", "offsets.bin"):
        path = tmp_path / "s" / name
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        with pytest.raises(ValueError, match=rf"{name}: {len(data) - 1} bytes, expected"):
            TokenStore.open(tmp_path / "s")
        path.write_bytes(data)
    meta = json.loads((tmp_path / "s" / "meta.json").read_text())
    (tmp_path / "s" / "meta.json").write_text(json.dumps(meta | {"format": 0}))
    with pytest.raises(ValueError, match="format 0, expected 1"):
        TokenStore.open(tmp_path / "s")


def test_keys_change_with_files_and_settings(tmp_path):
    file, folder = tmp_path / "a.txt", tmp_path / "folder"
    file.write_text("one")
    folder.mkdir()
    (folder / "b.txt").write_text("two")

    def key(**settings):
        return store_key([file, folder], **{"tokenizer": "t", "template": None, "max_length": 8} | settings)

    keys = [key(), key(tokenizer="u"), key(template="x"), key(max_length=9), key(more=[1])]
    assert key() == keys[0]
    (folder / "b.txt").write_text("three")
    keys.append(key())
    os.utime(file, ns=(0, 0))
    keys.append(key())
    (folder / "c.txt").write_text("")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    with pytest.raises(FileNotFoundError):
        store_key([tmp_path / "absent"])


def test_memory_stays_bounded(tmp_path):
    def rows():
        for _ in range(3000):
            yield example(np.arange(1000), last=False)  # one document of three million tokens
        for index in range(20_000):
            yield example(np.arange(100), np.arange(100) > index % 50)

    tracemalloc.start()
    try:
        store = make(tmp_path / "s", rows())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert store.counts.tokens == 5_000_000
    assert peak < 8_000_000, f"{peak} bytes for a data set of {(tmp_path / 's' / 'tokens.bin').stat().st_size}"


@pytest.mark.parametrize("vocab_size,dtype,width", [(300, None, 2), (70_000, None, 4), (300, "uint32", 4)])
def test_bin_files(tmp_path, vocab_size, dtype, width):
    tokens = np.random.default_rng(0).integers(1, 300, 1000)
    path = tmp_path / "train.bin"
    path.write_bytes(tokens.astype(f"<u{width}").tobytes())
    store = open_bin(path, vocab_size=vocab_size, dtype=dtype)
    assert len(store) == 1 and store.mask is None
    np.testing.assert_array_equal(store.document(0)[0], tokens)
    assert store.counts == Counts(rows=1, documents=1, tokens=1000, learnt_tokens=999)


def test_bin_documents_end_with_eos(tmp_path, monkeypatch):
    monkeypatch.setattr("data.store._CHUNK", 4)
    path = tmp_path / "train.bin"
    for tokens, expected in (
        ([1, 2, 9, 9, 3, 4, 5, 9], [[1, 2, 9], [9], [3, 4, 5, 9]]),
        ([1, 2, 3, 9, 4], [[1, 2, 3, 9], [4]]),
        ([1, 2, 3, 4, 5], [[1, 2, 3, 4, 5]]),
    ):
        path.write_bytes(np.array(tokens, "<u2").tobytes())
        assert [found for found, _ in documents(open_bin(path, vocab_size=10, eos_id=9))] == expected


def test_bytes_read_as_other_tokens_are_other_data(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "train.bin").write_bytes(np.array([1, 0, 2, 0], "<u2").tobytes())
    narrow, wide = (open_bin("~/train.bin", vocab_size=10, dtype=dtype) for dtype in ("uint16", "uint32"))
    assert (narrow.num_tokens, wide.num_tokens) == (4, 2)
    assert narrow.fingerprint != wide.fingerprint


def test_bin_files_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr("data.store._CHUNK", 4)
    path = tmp_path / "train.bin"
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"train.bin: 3 bytes are no uint16 tokens of 2 bytes each"):
        open_bin(path, vocab_size=100)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="0 bytes"):
        open_bin(path, vocab_size=100)
    path.write_bytes(np.array([1, 2, 3, 4, 5, 100, 7], "<u2").tobytes())
    with pytest.raises(ValueError, match=r"train.bin: token 5 is 100, not below vocab_size 100"):
        open_bin(path, vocab_size=100)
    with pytest.raises(ValueError, match="'uint8', expected uint16 or uint32"):
        open_bin(path, vocab_size=101, dtype="uint8")
    fingerprints = {open_bin(path, vocab_size=101, eos_id=eos_id).fingerprint for eos_id in (None, 3, 4)}
    assert len(fingerprints) == 3


def test_split_holds_out_documents(tmp_path):
    store = make(tmp_path / "s", [example([index, index, index]) for index in range(100)])
    kept, held = split(store, 0.1, seed=3)
    parts = [sorted(tokens[0] for tokens, _ in documents(part)) for part in (kept, held)]
    assert len(parts[1]) == 10 and sorted(parts[0] + parts[1]) == list(range(100))
    assert documents(split(store, 0.1, seed=3)[1]) == documents(held)
    assert documents(split(store, 0.1, seed=4)[1]) != documents(held)
    assert len({part.fingerprint for part in (store, kept, held, *split(store, 0.1, seed=4))}) == 5
    assert [len(part) for part in split(store, 0.01, seed=0)] == [99, 1]
    masked = make(tmp_path / "m", [example([1, 2, 3], mask=[0, 1, 0]) for _ in range(100)])
    assert [len(part) for part in split(masked, 0.0001, seed=0)] == [99, 1]


def test_split_of_one_stream_holds_out_its_tail(tmp_path):
    store = make(tmp_path / "s", [example(np.arange(100))])
    kept, held = split(store, 0.1, seed=3)
    assert [tokens for part in (kept, held) for tokens, _ in documents(part)] == [
        list(range(90)),
        list(range(90, 100)),
    ]
    assert kept.num_tokens == 90 and len({kept.fingerprint, held.fingerprint, store.fingerprint}) == 3


def test_split_of_few_long_texts_holds_out_no_more_than_was_asked(tmp_path):
    store = make(tmp_path / "s", [example(np.arange(40)), example(np.arange(100)), example(np.arange(60))])
    kept, held = split(store, 0.1, seed=3)
    assert [tokens for tokens, _ in documents(kept)] == [list(range(40)), list(range(80)), list(range(60))]
    assert [tokens for tokens, _ in documents(held)] == [list(range(80, 100))]


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5])
def test_senseless_splits_are_refused(tmp_path, fraction):
    store = make(tmp_path / "s", [example([1, 2]), example([1, 2])])
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        split(store, fraction, seed=0)
    with pytest.raises(ValueError, match=r"holding out 0.9 of 2 documents leaves none"):
        split(store, 0.9, seed=0)
    with pytest.raises(ValueError, match="leaves none to learn"):
        split(make(tmp_path / "t", [example([1, 2, 3])]), 0.5, seed=0)


def test_counts_are_those_of_the_file(tmp_path):
    store = make(tmp_path / "s", [example([1, 2])])
    meta = json.loads((tmp_path / "s" / "meta.json").read_text())
    assert meta["counts"] == dataclasses.asdict(store.counts)
