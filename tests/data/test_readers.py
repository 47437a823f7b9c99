"""Reading rows by number: every kind of file, what is wrong with files, and what it costs in memory."""

import gzip
import io
import itertools
import json
import random
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import data.readers_json
import data.readers_text
from data.readers import open_rows, read_record
from data.readers_base import Scratch
from data.records import BadRow, ChatRecord, PreferenceRecord, TextRecord

ROWS = [
    {"text": "one"},
    {"text": 'two "quoted" \\ [{,]} \n é 東京 😀'},
    {"text": "", "more": [1, [2, {"a": "}"}], {}], "last": None},
    {"text": "\\"},
]


def write(path, data):
    data = data.encode("utf-8") if isinstance(data, str) else data
    if path.suffix == ".gz":
        data = gzip.compress(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def lines(rows, end="\n"):
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def refused(error, path, *, match, **options):
    """Check that opening fails with one line that names the path."""
    with pytest.raises(error, match=match) as caught:
        open_rows(path, **options)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def records(rows, **options):
    return [read_record(rows, index, **options) for index in range(len(rows))]


def bad_row(rows, index, message):
    with pytest.raises(BadRow) as caught:
        rows[index]
    assert str(caught.value).startswith(message), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.gz"])
@pytest.mark.parametrize(
    "content",
    [
        lines(ROWS),
        lines(ROWS, "\r\n"),
        lines(ROWS).rstrip("\n"),
        "\ufeff" + lines(ROWS),
        "\n \n" + lines(ROWS, "\n\n\t\r\n"),
        "\ufeff\n" + lines(ROWS),
        lines(ROWS, "  \n"),
    ],
)
def test_json_lines(tmp_path, suffix, content):
    rows = open_rows(write(tmp_path / f"a{suffix}", content))
    assert list(rows) == ROWS
    assert len(rows) == len(ROWS)


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_lists(tmp_path, monkeypatch, suffix, chunk, ascii_only, indent):
    monkeypatch.setattr(data.readers_json, "_CHUNK", chunk)
    text = json.dumps(ROWS, ensure_ascii=ascii_only, indent=indent)
    for content in (text, f"\ufeff\r\n {text}\n\n", text.replace("\n", "\r\n")):
        rows = open_rows(write(tmp_path / f"a{suffix}", content))
        assert list(rows) == ROWS
    assert rows.where(1) == f"{tmp_path / f'a{suffix}'}:{5 if indent else 1}"


def test_random_access_is_sequential_access_from_any_thread(tmp_path):
    content = [{"text": "é" * (number % 50), "number": number} for number in range(3000)]
    paths = [
        write(tmp_path / "a.jsonl", lines(content)),
        write(tmp_path / "a.json", json.dumps(content)),
        write(tmp_path / "a.jsonl.gz", lines(content)),
    ]
    order = list(range(3000))
    random.Random(0).shuffle(order)
    for path in paths:
        rows = open_rows(path)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(rows.__getitem__, order))
        assert found == [content[number] for number in order]
        assert list(rows) == content
        assert rows[-1] == content[-1]
        for index in (3000, -3001):
            with pytest.raises(IndexError, match="of 3000 rows"):
                rows[index]


def test_lines_are_told_where_rows_are(tmp_path):
    path = write(tmp_path / "a.jsonl", '\n{"text": "a"}\n\n{"text": 3}\n[1]\n{"text": }\n{"text": "b"}')
    rows = open_rows(path)
    assert [rows.where(index) for index in range(5)] == [f"{path}:{line}" for line in (2, 4, 5, 6, 7)]
    bad_row(rows, 2, f"{path}:5: a row must be a JSON object, got list")
    bad_row(rows, 3, f"{path}:6: invalid JSON: Expecting value (column 10)")
    with pytest.raises(BadRow, match=f"^{path}:4: text must be a string, got int; the row has the keys"):
        read_record(rows, 1)


def test_bad_rows_of_a_list(tmp_path):
    path = write(tmp_path / "a.json", '[\n{"text": "a"},\n{\n"text":\n}, 3 ,"x",[]\n,{"a" "b"}{}\n]')
    rows = open_rows(path)
    assert len(rows) == 6
    assert rows[0] == {"text": "a"}
    bad_row(rows, 1, f"{path}:5: invalid JSON: Expecting value")
    bad_row(rows, 2, f"{path}:5: a row must be a JSON object, got int")
    bad_row(rows, 3, f"{path}:5: a row must be a JSON object, got str")
    bad_row(rows, 4, f"{path}:5: a row must be a JSON object, got list")
    bad_row(rows, 5, f"{path}:6: invalid JSON")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('[{"text": "a"},', "is cut off: its JSON list has no end$"),
        ('[{"text": "a"},\n{"text": "b', "no end, inside the element that begins on line 2"),
        ('[{"text": "a"}, {"text": "b\\', "no end, inside the element"),
        ("[1, [2}", "no end, inside the element that begins on line 1"),
        ('[{"text": "a"}]\n]', r"a.json:2: ']' behind the end of the JSON list"),
        ("[\n,1]", r"a.json:2: ',' where an element"),
        ("[1,\n]", r"a.json:2: ']' where an element"),
        ("[1,,2]", "',' where an element"),
        ("[\n}]", r"a.json:2: '}' that closes nothing"),
        ("[1}", "'}' that closes nothing"),
        ("[]", "has no rows"),
        ('{\n  "rows": [\n  ]\n}', r"neither a JSON list nor JSON lines \(.*a.json:1: invalid JSON"),
        ("3", "neither a JSON list nor JSON lines"),
        ("", "is empty"),
        (" \n", "has no rows"),
    ],
)
def test_json_files_that_are_no_data(tmp_path, content, match):
    for chunk in (1, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data.readers_json, "_CHUNK", chunk)
            refused(ValueError, write(tmp_path / "a.json", content), match=match)


def test_a_bad_first_line_does_not_spoil_json_lines(tmp_path):
    rows = open_rows(write(tmp_path / "a.json", '{"text"\n{"text": "b"}\n'))
    bad_row(rows, 0, f"{tmp_path / 'a.json'}:1: invalid JSON")
    assert rows[1] == {"text": "b"}


def test_bytes_that_are_not_utf8(tmp_path):
    good = b'{"text": "a"}\n'
    path = write(tmp_path / "a.jsonl", good * 2 + b'{"text": "\xff"}\n' + good)
    rows = open_rows(path)
    bad_row(rows, 2, f"{path}:3: not UTF-8 at byte 0xff")
    assert rows[3] == {"text": "a"}
    path = write(tmp_path / "a.json", b'[{"text":\n"\xe2\x82"}]')
    bad_row(open_rows(path), 0, f"{path}:2: not UTF-8 at byte 0xe2")
    path = write(tmp_path / "utf16.jsonl", '{"text": "a"}\n'.encode("utf-16"))
    bad_row(open_rows(path), 0, f"{path}:1: not UTF-8 at byte 0xff")


@pytest.mark.parametrize("half", ["\\ud800", "\\uDC00 x", "\\ud83dx"])
def test_half_characters_are_refused(tmp_path, half):
    path = write(tmp_path / "a.jsonl", f'{{"text": "\\ud83d\\ude00"}}\n{{"text": "{half}"}}\n')
    rows = open_rows(path)
    assert rows[0] == {"text": "😀"}
    bad_row(rows, 1, f"{path}:2: half of a surrogate pair, U+D")


def test_json_that_is_too_deep(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n" + lines(ROWS))
    rows = open_rows(path)
    bad_row(rows, 0, f"{path}:1: invalid JSON: ")
    assert rows[1] == ROWS[0]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.txt.gz"])
def test_damaged_gzip_files(tmp_path, name):
    path = tmp_path / name
    write(path, lines([{"text": str(random.Random(number).random())} for number in range(1000)]))
    packed = path.read_bytes()
    path.write_bytes(packed[: len(packed) // 2])
    refused(ValueError, path, match="is cut off: its gzip stream has no end")
    path.write_bytes(packed[:100] + b"\0\0\0\0" + packed[104:])
    refused(ValueError, path, match="is no valid gzip file")
    path.write_bytes(b"plain text")
    refused(ValueError, path, match="is no valid gzip file")
    path.write_bytes(gzip.compress(b""))
    refused(ValueError, path, match="has no rows")


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
@pytest.mark.parametrize("piece", [5, 7, 16, 1 << 20])
@pytest.mark.parametrize(
    "content", ["a b\r\nc\n\n" * 20, "one two three four\n", "é東京😀" * 9, "no end of line", "\n\n", " " * 30]
)
def test_pieces_join_to_the_file(tmp_path, monkeypatch, suffix, piece, content):
    monkeypatch.setattr(data.readers_text, "_PIECE", piece)
    for begin in ("", "\ufeff"):
        path = write(tmp_path / f"a{suffix}", begin + content)
        rows = open_rows(path)
        found = records(rows)
        assert "".join(record.text for record in found) == content
        assert [record.first for record in found] == [True] + [False] * (len(found) - 1)
        assert [record.last for record in found] == [False] * (len(found) - 1) + [True]
        places = itertools.accumulate((record.text for record in found[:-1]), initial="")
        assert [rows.where(index) for index in range(len(rows))] == [
            f"{path}:{1 + text.count(chr(10))}" for text in places
        ]


def test_pieces_end_with_lines_and_then_with_words(tmp_path, monkeypatch):
    monkeypatch.setattr(data.readers_text, "_PIECE", 10)
    rows = open_rows(write(tmp_path / "a.txt", "ab cd\nef gh ij kl mn\nop"))
    assert [row["text"] for row in rows] == ["ab cd\n", "ef gh ij", " kl mn\nop"]


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_lines_and_paragraphs(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", "\ufeff\n \nTitle \n\n a\r\nb\n\t\nc\n\n\n")
    rows = open_rows(path, unit="line")
    assert list(rows) == [{"text": text} for text in ("Title ", " a", "b", "c")]
    assert [rows.where(index) for index in range(4)] == [f"{path}:{line}" for line in (3, 5, 6, 8)]
    rows = open_rows(path, unit="paragraph")
    assert list(rows) == [{"text": text} for text in ("Title ", " a\r\nb", "c")]
    assert [rows.where(index) for index in range(3)] == [f"{path}:{line}" for line in (3, 5, 8)]
    assert list(open_rows(write(tmp_path / "b.txt", "a\nb"), unit="paragraph")) == [{"text": "a\nb"}]


def test_a_text_that_is_not_utf8_is_one_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr(data.readers_text, "_PIECE", 8)
    write(tmp_path / "set" / "a.txt", "first\n")
    path = write(tmp_path / "set" / "b.txt", b"good\ngood\ngood\nbad \xe9t\xe9\ngood\n")
    write(tmp_path / "set" / "c.txt", "third\n")
    rows = open_rows(tmp_path / "set")
    assert [read_record(rows, index) for index in (0, 2)] == [TextRecord(text="first\n"), TextRecord(text="third\n")]
    assert len(rows) == 3
    bad_row(rows, 1, f"{path}:4: not UTF-8 at byte 0xe9")
    rows = open_rows(path, unit="line")
    assert rows[4] == {"text": "good"}
    bad_row(rows, 3, f"{path}:4: not UTF-8")


def test_folders_and_patterns(tmp_path):
    folder = tmp_path / "set"
    write(folder / "b.jsonl", lines([{"text": "3"}, {"text": "4"}]))
    write(folder / "a" / "z.txt", "1")
    write(folder / "a.json", json.dumps([{"text": "2"}]))
    write(folder / "c.jsonl.gz", lines([{"text": "5"}]))
    write(folder / "README.md", "no data")
    write(folder / ".cache" / "x.jsonl", lines([{"text": "hidden"}]))
    rows = open_rows(folder)
    assert [row["text"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert [rows.where(index).rpartition("/")[2] for index in (0, 1, 3, 4)] == [
        "z.txt:1",
        "a.json:1",
        "b.jsonl:2",
        "c.jsonl.gz:1",
    ]
    assert [row["text"] for row in open_rows(f"{folder}/*.jsonl*")] == ["3", "4", "5"]
    assert [row["text"] for row in open_rows(f"{folder}/**/*.[tj]*")] == ["1", "2", "3", "4", "5"]
    assert [row["text"] for row in open_rows(f"{tmp_path}/s?t")] == ["1", "2", "3", "4", "5"]
    odd = write(tmp_path / "[odd]*.jsonl", lines([{"text": "odd"}]))
    assert list(open_rows(odd)) == [{"text": "odd"}]


def test_compressed_files_of_a_folder_stay_apart(tmp_path):
    write(tmp_path / "a.txt.gz", "first\n")
    write(tmp_path / "b.txt.gz", "second\nsecond\n")
    write(tmp_path / "c.jsonl.gz", lines(ROWS))
    rows = open_rows(tmp_path)
    texts = [row["text"] for row in rows]
    assert texts == ["first\n", "second\nsecond\n", *(row["text"] for row in ROWS)]
    assert [rows[index - len(rows)]["text"] for index in range(len(rows))] == texts
    assert rows.where(-1) == f"{tmp_path / 'c.jsonl.gz'}:4"
    assert rows[-5] == {"text": "second\nsecond\n", "first": True, "last": True}


def test_an_unpacked_file_ends_where_the_next_begins(tmp_path):
    paths = [write(tmp_path / f"{name}.txt.gz", name * 5) for name in "ab"]
    scratch = Scratch()
    first, second = (scratch.unpack(Path(path)) for path in paths)
    assert (first.read(3, 99), second.read(3, 99)) == (b"aa", b"bb")
    with first.open() as stream:
        assert stream.read() == b"aaaaa"


def test_what_is_not_there_is_told(tmp_path):
    refused(FileNotFoundError, tmp_path / "no.jsonl", match="no such file, folder or data set")
    refused(FileNotFoundError, f"{tmp_path}/*.jsonl", match="no file matches")
    refused(FileNotFoundError, "data/no.jsonl", match="no such file")
    refused(FileNotFoundError, "nowhere", match="no such file")
    (tmp_path / "empty").mkdir()
    refused(ValueError, tmp_path / "empty", match="no data in the folder")
    for name in ("a.jsonl", "a.json", "a.txt", "a.parquet", "a.jsonl.gz"):
        (tmp_path / name).touch()
        refused(ValueError, tmp_path / name, match="is empty$")
    refused(ValueError, write(tmp_path / "a.csv", "a,b"), match="none of the endings .jsonl, ")
    path = write(tmp_path / "b.jsonl", lines(ROWS))
    refused(ValueError, path, match="split 'test' is for Hugging Face", split="test")
    refused(ValueError, path, match="unit 'line' is for text files", unit="line")
    refused(ValueError, "hf:owner/name", match="unit 'line' is for text files", unit="line")
    with pytest.raises(ValueError, match=r"unknown unit 'page', expected one of \('file', 'line', 'paragraph'\)"):
        open_rows(path, unit="page")
    with pytest.raises(ValueError, match="is empty"):
        open_rows("")


def test_a_file_that_changes_is_noticed(tmp_path):
    path = write(tmp_path / "a.jsonl", lines(ROWS))
    rows = open_rows(path)
    assert rows[0] == ROWS[0]
    write(tmp_path / "a.jsonl", lines([{"text": "other"}]))
    with pytest.raises(OSError, match=r"a\.jsonl has changed since it was opened"):
        rows[0]


def test_rows_that_are_no_record_are_told_with_their_place(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"txt": "b"}\n{"text": "c"}\n{\n')
    rows = open_rows(path)
    assert [read_record(rows, index) for index in (0, 2)] == [TextRecord(text="a"), TextRecord(text="c")]
    with pytest.raises(BadRow, match=rf"^{path}:2: the row fits no format .*; the row has the keys \['txt'\]$"):
        read_record(rows, 1)
    with pytest.raises(BadRow, match=rf"^{path}:4: invalid JSON"):
        read_record(rows, 3)


def test_the_format_of_rows_can_be_named(tmp_path):
    rows = open_rows(write(tmp_path / "a.jsonl", '{"text": "a", "instruction": "b", "output": "c"}'))
    assert records(rows, format="text") == [TextRecord(text="a")]
    with pytest.raises(BadRow, match="fits the formats text, alpaca"):
        records(rows)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.txt"])
def test_files_are_not_held_in_memory(tmp_path, name):
    path = tmp_path / name
    texts = [('word \\ " \n' * 300)[: 2000 + number % 100] for number in range(15_000)]
    if name == "a.txt":
        write(path, "\n".join(texts))
    elif name == "a.json":
        write(path, json.dumps([{"text": text} for text in texts]))
    else:
        write(path, lines([{"text": text} for text in texts]))
    size = sum(map(len, texts))
    tracemalloc.start()
    try:
        rows = open_rows(path)
        for index in range(0, len(rows), 97):
            rows[index]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 30e6
    assert peak < size / 5


@pytest.mark.parametrize("group_size", [1, 7, 1000])
def test_parquet(tmp_path, group_size):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    content = [{"messages": [{"role": "user", "content": f"é {number}"}], "number": number} for number in range(50)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(content), path, row_group_size=group_size)
    rows = open_rows(path)
    order = random.Random(0).sample(range(50), 50)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(rows.__getitem__, order)) == [content[number] for number in order]
    assert list(rows) == content
    assert rows.where(49) == f"{path}:50"
    assert read_record(rows, 3) == ChatRecord(messages=({"role": "user", "content": "é 3"},))


def test_parquet_with_columns_of_other_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "a", "messages": None}, {"text": None, "messages": [{"role": "user", "content": "b"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [type(record) for record in records(open_rows(tmp_path / "a.parquet"))] == [TextRecord, ChatRecord]


def test_a_parquet_file_that_is_gone_is_no_bad_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    rows = open_rows(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(FileNotFoundError):
        rows[0]


# Two calls with arguments of their own: a column of them has both arguments in every row.
CALLING_ROWS = [
    {
        "messages": [
            {"role": "user", "content": name},
            {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": {f"of_{name}": [None, 1]}}}]},
        ],
        "tools": [{"name": name, "parameters": {"properties": {f"of_{name}": {"type": "string"}}}}],
    }
    for name in ("f", "g")
]


@pytest.mark.parametrize("kind", ["parquet", "hub"])
def test_keys_of_other_rows_do_not_become_nulls(tmp_path, monkeypatch, kind):
    if kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").Table.from_pylist(CALLING_ROWS)
        parquet.write_table(table, tmp_path / "a.parquet")
        rows = open_rows(tmp_path / "a.parquet")
    else:
        datasets = pytest.importorskip("datasets")
        made = {"train": datasets.Dataset.from_list(CALLING_ROWS)}
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: made)
        rows = open_rows("hf:calls")
    assert list(rows) == CALLING_ROWS


def test_parquet_files_that_are_none(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    refused(ValueError, write(tmp_path / "a.parquet", "no parquet"), match="is no valid Parquet file")
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "b.parquet")
    refused(ValueError, tmp_path / "b.parquet", match="has no rows")
    parquet.write_table(pyarrow.table({"text": ["a" * 100, "b" * 100]}), tmp_path / "c.parquet", compression="gzip")
    damaged = bytearray((tmp_path / "c.parquet").read_bytes())
    damaged[4:60] = bytes(56)
    (tmp_path / "c.parquet").write_bytes(damaged)
    bad_row(open_rows(tmp_path / "c.parquet"), 1, f"{tmp_path / 'c.parquet'}:2: ")


def test_without_the_packages_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    extra = r'needs pyarrow: pip install "ropewalk\[data\]"'
    refused(ValueError, write(tmp_path / "a.parquet", "x"), match=extra)
    for name in ("owner/name", "hf:name"):
        with pytest.raises(ValueError, match=r'needs datasets: pip install "ropewalk\[data\]"'):
            open_rows(name)


class Hub:
    """What stands in for the hub: two data sets, of which one has no split named train."""

    def __init__(self, datasets):
        self.asked = []
        split = datasets.Dataset.from_list
        self.sets = {
            "owner/name": {"train": split([{"question": "a", "answer": "b"}] * 3), "test": split([{"text": "t"}])},
            "plain": {"validation": split([{"text": "v"}]), "test": split([{"text": "t"}])},
            "single": {"test": split([{"text": "t"}])},
        }

    def load_dataset(self, name, config=None, *, split=None):
        self.asked.append((name, config, split))
        if name not in self.sets or (split and split not in self.sets[name]):
            raise ConnectionError("cannot\nreach it")
        return self.sets[name][split] if split else self.sets[name]


def test_hugging_face_data_sets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    hub = Hub(datasets)
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    rows = open_rows("owner/name")
    assert list(rows) == [{"question": "a", "answer": "b"}] * 3
    assert rows.where(1) == "owner/name[train]:2"
    assert open_rows("hf:owner/name:main", split="test").where(0) == "owner/name:main[test]:1"
    assert list(open_rows("owner/name:main", split="test")) == [{"text": "t"}]
    assert list(open_rows("hf:single")) == [{"text": "t"}]
    assert hub.asked == [
        ("owner/name", None, None),
        ("owner/name", "main", "test"),
        ("owner/name", "main", "test"),
        ("single", None, None),
    ]
    with pytest.raises(ValueError, match=r"plain has no split 'train'; name one of \['test', 'validation'\]"):
        open_rows("hf:plain")
    with pytest.raises(
        ValueError, match=r"^there is no path no/such, and cannot load the .* no/such: ConnectionError: cannot reach"
    ):
        open_rows("no/such")


def test_a_folder_comes_before_a_data_set_of_its_name(tmp_path, monkeypatch):
    write(tmp_path / "owner" / "name" / "a.jsonl", lines(ROWS))
    monkeypatch.chdir(tmp_path)
    assert list(open_rows("owner/name")) == ROWS


def test_datasets_reads_a_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "set" / "train.jsonl", lines([{"text": "a"}, {"text": "b"}]))
    rows = open_rows(f"hf:{tmp_path / 'set'}", split="train[1:]")
    assert list(rows) == [{"text": "b"}]


@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [
        ("llamafactory/alpaca_en_demo.json", 999, ChatRecord),
        ("llamafactory/identity.json", 91, ChatRecord),
        ("llamafactory/dpo_en_demo.json", 300, PreferenceRecord),
        ("llamafactory/glaive_toolcall_en_demo.json", 300, ChatRecord),
        ("gsm8k/train.jsonl", 7473, ChatRecord),
    ],
)
def test_real_json(assets_dir, tmp_path, name, count, kind):
    path = assets_dir / "data" / name
    text = path.read_text(encoding="utf-8")
    expected = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in io.StringIO(text)]
    rows = open_rows(path)
    assert list(rows) == expected
    assert len(rows) == count
    for index in random.Random(0).sample(range(count), 20):
        assert rows[index] == expected[index]
        number = int(rows.where(index).rpartition(":")[2])
        assert text.splitlines()[number - 1].lstrip().startswith("{")
    assert {type(record) for record in records(rows)} == {kind}
    if name.endswith(".json"):
        assert list(open_rows(write(tmp_path / "a.json.gz", json.dumps(expected)))) == expected


@pytest.mark.parametrize("name", ["tinyshakespeare/input.txt", "wikitext2/valid.txt"])
def test_real_text(assets_dir, name):
    path = assets_dir / "data" / name
    text = path.read_bytes().decode("utf-8")
    pieces = records(open_rows(path))
    assert len(pieces) == 2
    assert "".join(piece.text for piece in pieces) == text
    assert all(piece.text.endswith("\n") for piece in pieces[:-1])
    lines_of_text = [line for line in text.split("\n") if line.strip()]
    assert [row["text"] for row in open_rows(path, unit="line")] == lines_of_text
    paragraphs = list(open_rows(path, unit="paragraph"))
    assert [line for row in paragraphs for line in row["text"].split("\n")] == lines_of_text
    assert len(paragraphs) == len(
        [1 for blank, _ in itertools.groupby(text.split("\n"), lambda s: not s.strip()) if not blank]
    )
