"""Settings files and flags to dataclasses: what each way of writing a value means, and what a mistake looks like."""

import dataclasses
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from utils.settings import describe, diff, dump_yaml, from_dict, load_settings, to_dict


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters of low rank."""

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "v")


@dataclass(frozen=True, kw_only=True)
class Source:
    path: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Data:
    train: tuple[Source, ...] = ()
    packing: Literal["best_fit", "none", 2] | None = "best_fit"
    cache: Path | None = None
    shares: dict[str, float] = field(default_factory=lambda: {"a": 1.0})


@dataclass(frozen=True, kw_only=True)
class Trainer:
    learning_rate: float = field(default=3e-4, metadata={"help": "The peak."})
    steps: int = 10
    "How many updates."
    rows: int = 8  # Rows of a batch.
    # Rows that go through
    # the model at once.
    micro_rows: int = 8
    save_every: int | float = 100
    betas: tuple[float, float] = (0.9, 0.95)
    bf16: bool = True
    seed: int | None = None
    name: str = "run"
    note: str | None = None

    def __post_init__(self):
        if self.rows % self.micro_rows:
            raise ValueError(f"rows {self.rows} is not a multiple of micro_rows {self.micro_rows}")


@dataclass(frozen=True, kw_only=True)
class Model:
    checkpoint: str | None
    window: int | str = "full"
    remat: bool | str = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: Model
    trainer: Trainer = Trainer(steps=20)
    data: Data = Data()
    lora: Lora | None = None
    optimizer: Trainer | str = "adamw"


MODEL = "model: {checkpoint: c}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, so that messages name files as short as they are written."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *argv: str, cls=Settings):
    Path("run.yaml").write_text(text, encoding="utf-8")
    return load_settings(cls, "run.yaml", argv)


def mistake(text: str, *argv: str, cls=Settings) -> str:
    """The one line that a mistake is answered with."""
    with pytest.raises(ValueError) as error:
        load(text, *argv, cls=cls)
    assert "\n" not in str(error.value)
    return str(error.value)


@dataclass(frozen=True, kw_only=True)
class Any:
    """A field of every kind."""

    i: int = 0
    f: float = 0.0
    b: bool = False
    s: str = ""
    p: Path = Path("p")
    oi: int | None = None
    of: float | None = None
    os: str | None = None
    number: int | float = 0
    word: int | str = 0
    choice: Literal["no", "on", 3, True] | None = None
    names: tuple[str, ...] = ()
    pair: tuple[int, float] = (0, 0.0)
    grid: tuple[tuple[int, ...], ...] = ()
    table: dict[str, int | None] = field(default_factory=dict)
    lists: dict[str, tuple[str, ...]] | None = None
    either: tuple[str, ...] | str = ""


READ = [
    ("i", "7", 7),
    ("i", "-7", -7),
    ("i", "+7", 7),
    ("i", "1_000", 1000),
    ("i", "0", 0),
    ("f", "1e-5", 1e-5),
    ("f", "3e-4", 3e-4),
    ("f", "1E5", 1e5),
    ("f", "-.5", -0.5),
    ("f", "1.", 1.0),
    ("f", "2", 2.0),
    ("b", "true", True),
    ("b", "False", False),
    ("b", "yes", True),
    ("b", "on", True),
    ("b", "off", False),
    ("b", "No", False),
    ("s", "no", "no"),
    ("s", "on", "on"),
    ("s", "2024-01-01", "2024-01-01"),
    ("s", "010", "010"),
    ("s", "1:30", "1:30"),
    ("s", "0x10", "0x10"),
    ("s", "naïve 🎈", "naïve 🎈"),
    ("p", "a/b", Path("a/b")),
    ("oi", "null", None),
    ("oi", "3", 3),
    ("of", "1e-3", 1e-3),
    ("os", "null", None),
    ("os", "x", "x"),
    ("number", "1", 1),
    ("number", "1.0", 1.0),
    ("word", "1", 1),
    ("word", "full", "full"),
    ("choice", "no", "no"),
    ("choice", "on", "on"),
    ("choice", "3", 3),
    ("choice", "true", True),
    ("choice", "null", None),
    ("names", "[a, on, 'null']", ("a", "on", "null")),
    ("names", "[]", ()),
    ("pair", "[1, 2]", (1, 2.0)),
    ("grid", "[[1], [2, 3], []]", ((1,), (2, 3), ())),
    ("table", "{a: 1, on: null}", {"a": 1, "on": None}),
    ("lists", "{a: [x]}", {"a": ("x",)}),
    ("either", "[a]", ("a",)),
    ("either", "a", "a"),
]


@pytest.mark.parametrize(("key", "text", "value"), READ)
def test_values_in_a_file_and_behind_a_flag(folder, key, text, value):
    for settings in (
        load(f"{key}: {text}", cls=Any),
        load("", f"--{key}={text}", cls=Any),
        load("", f"--{key}", text, cls=Any),
        load_settings(Any, None, {key: text}),
    ):
        found = getattr(settings, key)
        assert found == value and type(found) is type(value)
        assert {name.partition(".")[0] for name in diff(settings, Any())} == (
            {key} if value != getattr(Any(), key) else set()
        )


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        *[
            ("s", text, text)
            for text in ("123", "null", "", "~", "'q'", "true", "1e5", "[a]", "[a", "{a: 1}", "a: b", "#x")
        ],
        ("os", "null", None),
        ("os", "none", "none"),
        ("os", "", ""),
        ("oi", "none", None),
        ("of", "None", None),
        ("p", "12", Path("12")),
        ("word", "007", "007"),
        ("word", "1.5", "1.5"),
        ("b", "1", True),
        ("b", "0", False),
        ("names", "[1, on, 1e5]", ("1", "on", "1e5")),
        ("choice", "none", None),
        ("table", "{a: 1}", {"a": 1}),
    ],
)
def test_a_flag_is_read_as_its_field_demands(folder, key, text, value):
    assert getattr(load("", f"--{key}={text}", cls=Any), key) == value


@pytest.mark.parametrize(
    ("key", "text", "complaint"),
    [
        ("i", "3.0", "expected a whole number, got 3.0; write 3"),
        ("i", "1e6", "expected a whole number, got 1e6; write 1000000"),
        ("i", "1.5", "expected a whole number, got 1.5"),
        ("i", "true", "expected a whole number, got true"),
        ("i", "abc", "expected a whole number, got 'abc'"),
        ("i", "010", "expected a whole number, got '010'"),
        ("f", "abc", "expected a number, got 'abc'"),
        ("f", ".inf", "expected a number, got '.inf'"),
        ("f", ".nan", "expected a number, got '.nan'"),
        ("f", "1e999", "expected a number, got 1e999"),
        ("f", "9" * 400, f"expected a number, got {'9' * 57}..."),
        ("f", "9" * 5000, f"expected a number, got '{'9' * 56}..."),
        ("f", "true", "expected a number, got true"),
        ("b", "maybe", "expected true or false, got 'maybe'"),
        ("b", "2", "expected true or false, got 2"),
        ("oi", "x", "expected a whole number or null, got 'x'"),
        ("number", "x", "expected a whole number or a number, got 'x'"),
        ("choice", "nope", "expected 'no' or 'on' or 3 or true or null, got 'nope'"),
        ("choice", "1", "expected 'no' or 'on' or 3 or true or null, got 1"),
        ("names", "{a: 1}", "expected a list (each text), got a mapping of a"),
        ("pair", "[1]", "expected a list of 2 (a whole number, a number), got a list of 1"),
        ("pair", "[1, 2, 3]", "expected a list of 2 (a whole number, a number), got a list of 3"),
        ("table", "[1]", "expected a mapping (each value a whole number or null), got a list of 1"),
        ("table", "x", "expected a mapping (each value a whole number or null), got 'x'"),
    ],
)
def test_a_bad_value_names_file_key_and_value(folder, key, text, complaint):
    if key != "names":  # whose mappings patch, on the command line
        assert mistake("", f"--{key}={text}", cls=Any) == f"--{key}: {complaint}"
    assert mistake(f"{key}: {text}", cls=Any) == f"run.yaml: {key}: {complaint}"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("s: 123", 's: expected text, got 123; write "123"'),
        ("s: true", 's: expected text, got true; write "true"'),
        ("s: null", "s: expected text, got null"),
        ("s:", "s: expected text, got null"),
        ("s: [a]", "s: expected text, got a list of 1"),
        ("p: 1", 'p: expected a path, got 1; write "1"'),
        ("i: '3'", "i: expected a whole number, got '3'"),
        ("b: 'yes'", "b: expected true or false, got 'yes'"),
        ("b: 1", "b: expected true or false, got 1"),
        ("f: none", "f: expected a number, got 'none'"),
        ("oi: none", "oi: expected a whole number or null, got 'none'"),
        ("names: x", "names: expected a list (each text), got 'x'"),
        ("names: [a, 1]", 'names.1: expected text, got 1; write "1"'),
        ("names: {0: a}", "names: expected a list (each text), got a mapping of 0"),
        ("grid: [[1], [x]]", "grid.1.0: expected a whole number, got 'x'"),
        ("table: {a: x}", "table.a: expected a whole number or null, got 'x'"),
    ],
)
def test_a_file_is_stricter_than_the_command_line(folder, text, complaint):
    assert mistake(text, cls=Any) == f"run.yaml: {complaint}"


def test_sections_and_their_defaults(folder):
    settings = load(MODEL + "trainer: {rows: 16}\nlora: {rank: 4}\ndata:\n  train:\n  - path: x\n")
    assert settings.trainer == Trainer(steps=20, rows=16)  # steps are those of the section's own default
    assert settings.lora == Lora(rank=4) and settings.data.train == (Source(path="x"),)
    assert load(MODEL + "optimizer: {rows: 16}\n").optimizer == Trainer(rows=16)
    assert load(MODEL + "optimizer: lion\n").optimizer == "lion"
    assert load(MODEL + "lora: null\n").lora is None
    assert load(MODEL + "data: {shares: {b: 2}}\n").data.shares == {"b": 2.0}


def test_anchors_and_merge_keys(folder):
    settings = load(MODEL + "trainer: &t {rows: 16, steps: 1}\noptimizer:\n  <<: *t\n  steps: 2\n")
    assert settings.optimizer == Trainer(rows=16, steps=2)
    text = "i: 0\nlists: {}\ntable:\n  <<: [{a: 1, b: 1}, {b: 2, c: 2}]\n  c: 3\n"
    assert load(text, cls=Any).table == {"a": 1, "b": 1, "c": 3}  # the earlier wins, as YAML has it
    assert "line 2: <<: expected a mapping, got 3" in mistake(MODEL + "trainer: {<<: 3}")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--trainer.learning_rate=1e-5"], {"trainer.learning_rate": 1e-5}),
        (["--trainer.learning_rate", "1e-5"], {"trainer.learning_rate": 1e-5}),
        (["--trainer.seed", "-1"], {"trainer.seed": -1}),
        (["--trainer.name=123"], {"trainer.name": "123"}),
        (["--trainer.name=--x"], {"trainer.name": "--x"}),
        (["--trainer.name=a=b"], {"trainer.name": "a=b"}),
        (["--trainer.bf16=no"], {"trainer.bf16": False}),
        (["--trainer.betas=[0, 1]"], {"trainer.betas.0": 0.0, "trainer.betas.1": 1.0}),
        (["--trainer.betas.1=0.5"], {"trainer.betas.1": 0.5}),
        (["--data.packing", "none"], {"data.packing": "none"}),
        (["--data.packing=null"], {"data.packing": None}),
        (["--data.packing=2"], {"data.packing": 2}),
        (["--model.checkpoint=null"], {"model.checkpoint": None}),
        (["--data.train.0.path=x"], {"data.train.0.path": "x"}),
        (["--data.train.1.path=x", "--data.train.1.weight=2"], {"data.train": [dict(path="d"), dict(path="x")]}),
        (["--data.train=[]"], {"data.train": []}),
        (["--data.shares.b=2"], {"data.shares.b": 2.0}),
        (["--lora.rank=8"], {"lora": dict(rank=8)}),
        (["--lora.rank=8", "--lora.targets.0=o"], {"lora": dict(rank=8, targets=("o", "v"))}),
        (["--lora={rank: 8, alpha: 1}"], {"lora": dict(rank=8, alpha=1)}),
        (["--lora=null", "--lora.rank=8"], {"lora": dict(rank=8)}),
        (["--lora.rank=8", "--lora=null"], {}),
        (["--optimizer=lion"], {"optimizer": "lion"}),
        (["--optimizer.rows=16"], {"optimizer": dict(rows=16)}),
        (["--model.remat"], {"model.remat": True}),
        (["--model.remat", "--trainer.steps=3"], {"model.remat": True, "trainer.steps": 3}),
        (["--model.remat=full"], {"model.remat": "full"}),
    ],
)
def test_flags_lie_over_the_file(folder, argv, expected):
    text = MODEL + "data: {train: [{path: d}]}\n"
    plain, changed = load(text), load(text, *argv)
    assert diff(plain, changed) == list(expected)
    for key, value in expected.items():
        found = to_dict(changed)
        for part in key.split("."):
            found = found[int(part) if isinstance(found, list) else part]
        if isinstance(value, dict):
            assert getattr(changed, key) == (Lora if key == "lora" else Trainer)(**value)
        elif value and isinstance(value, list):
            assert changed.data.train == (Source(path="d"), Source(path="x", weight=2.0))
        else:
            assert found == value and type(found) is type(value)


def test_a_flag_patches_what_the_file_says_before_the_default(folder):
    assert load(MODEL, "--data.shares.b=2").data.shares == {"a": 1.0, "b": 2.0}
    assert load(MODEL + "data: {shares: {c: 3}}", "--data.shares.b=2").data.shares == {"c": 3.0, "b": 2.0}
    assert mistake(MODEL + "lora: {alpha: 1}", "--lora.targets=[o]") == "run.yaml: lora.rank: required, but not given"
    assert mistake("", "--s=[a]", "--s.0=b", cls=Any) == "--s: expected text, got a list of 1"


def test_a_word_of_a_choice_that_looks_like_a_number(folder):
    cls = dataclasses.make_dataclass("Choice", [("x", Literal["1", "2"], "2")])
    assert load("x: '1'", cls=cls).x == load("", "--x=1", cls=cls).x == "1"
    assert mistake("x: 1", cls=cls) == "run.yaml: x: expected '1' or '2', got 1"


def test_a_key_of_another_section_is_nearer_than_a_similar_one(folder):
    cls = dataclasses.make_dataclass("Outer", [("learning_rates", int, 0), ("trainer", Trainer, Trainer())])
    assert (
        mistake("learning_rate: 1", cls=cls) == "run.yaml: learning_rate: unknown; did you mean trainer.learning_rate?"
    )


def test_a_flag_patches_a_default_list(folder):
    @dataclass(frozen=True, kw_only=True)
    class Mix:
        train: tuple[Source, ...] = (Source(path="a", weight=3.0), Source(path="b"))

    assert load("", "--train.0.path=x", cls=Mix).train == (Source(path="x", weight=3.0), Source(path="b"))
    assert load("", "--train.2.path=x", cls=Mix).train[2] == Source(path="x")
    assert mistake("", "--train.3.path=x", cls=Mix) == (
        "--train.3.path: train: expected the index of an item, 0 to 2, got '3'"
    )


def test_without_a_file(folder):
    assert load_settings(Settings, None, ["--model.checkpoint=c"]) == Settings(model=Model(checkpoint="c"))
    with pytest.raises(ValueError, match=r"^command line: model: required, but not given$"):
        load_settings(Settings, None)
    assert (
        load_settings(Any, None) == Any() == load("", cls=Any) == load("# nothing\n", cls=Any) == load("---", cls=Any)
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("trainer: {learning_rat: 1}", "trainer.learning_rat: unknown; did you mean trainer.learning_rate?"),
        ("trianer: {}", "trianer: unknown; did you mean trainer?"),
        ("learning_rate: 1", "learning_rate: unknown; did you mean trainer.learning_rate?"),
        ("zzz: 1", "zzz: unknown; known keys: model, trainer, data, lora, optimizer"),
        ("lora: {zzz: 1}", "lora.zzz: unknown; known keys: rank, alpha, targets"),
        ("data: {train: [{path: a}, {pth: b}]}", "data.train.1.pth: unknown; did you mean data.train.1.path?"),
        ("trainer.rows: 1", "trainer.rows: unknown; a key with dots is for the command line"),
        ("trainer: {base: x}", "trainer.base: unknown; "),
        ("lora: {}", "lora.rank: required, but not given"),
        ("data: {train: [{weight: 1}]}", "data.train.0.path: required, but not given"),
        ("model: {}", "model.checkpoint: required, but not given"),
        ("trainer: null", "trainer: expected a section, got null"),
        ("trainer: 3", "trainer: expected a section, got 3"),
        ("trainer: [3]", "trainer: expected a section, got a list of 1"),
        ("lora: x", "lora: expected a section or null, got 'x'"),
        ("optimizer: 3", 'optimizer: expected a section or text, got 3; write "3"'),
        ("trainer: {rows: 9}", "trainer: rows 9 is not a multiple of micro_rows 8"),
        ("data: {train: [{path: a, weight: x}]}", "data.train.0.weight: expected a number, got 'x'"),
    ],
)
def test_a_mistake_names_file_and_key(folder, text, complaint):
    model = "" if text.startswith("model") else MODEL
    assert mistake(model + text).startswith(f"run.yaml: {complaint}")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--trainer.learning_rate=abc"], "--trainer.learning_rate: expected a number, got 'abc'"),
        (["--trainer.steps", "1.5"], "--trainer.steps: expected a whole number, got 1.5"),
        (["--trainer.steps="], "--trainer.steps: expected a whole number, got ''"),
        (["--trainer.lerning_rate=1"], "--trainer.lerning_rate: unknown; did you mean --trainer.learning_rate?"),
        (["--learning_rate=1"], "--learning_rate: unknown; did you mean --trainer.learning_rate?"),
        (["--zzz=1"], "--zzz: unknown; known keys: model, "),
        (["--base=x"], "--base: unknown; known keys: "),
        (["--lora={rnk: 8}"], "--lora: lora.rnk: unknown; did you mean --lora.rank?"),
        (["--lora.alpha=8"], "--lora.alpha: lora.rank: required, but not given"),
        (["--trainer.steps.x=1"], "--trainer.steps.x: trainer.steps: expected a whole number, got a mapping of x"),
        (["--data.train.2.path=x"], "--data.train.2.path: data.train: expected the index of an item, 0 to 1, got '2'"),
        (["--data.train.a=x"], "--data.train.a: data.train: expected the index of an item, 0 to 1, got 'a'"),
        (["--data.train.-1=x"], "--data.train.-1: data.train: expected the index"),
        (["--data.train.1.weight=2"], "--data.train.1.weight: data.train.1.path: required, but not given"),
        (["--data.train=x"], "--data.train: expected a list (each a section), got 'x'; write [x]"),
        (["--lora={rank: 8"], "--lora: expected a section or null, got '{rank: 8'"),
        (["--trainer.steps"], "--trainer.steps: needs a value: a whole number"),
        (["--lora"], "--lora: needs a value: a section or null"),
        (["--trainer.name", "--trainer.steps=3"], "--trainer.name: needs a value: text"),
        (["--trainer.steps=1", "--trainer.steps=2"], "--trainer.steps is given twice"),
        (["--trainer..steps=1"], "--trainer..steps: a key is words with dots between them"),
        (["--=1"], "--: a key is words"),
        (["x"], "unexpected argument 'x': every value needs its --key"),
        (["--trainer.steps", "1", "2"], "unexpected argument '2'"),
        (["-x"], "unexpected argument '-x'"),
        (["--"], "unexpected argument '--'"),
        (["--trainer.rows=9"], "--trainer.rows: trainer: rows 9 is not a multiple of micro_rows 8"),
    ],
)
def test_a_mistake_on_the_command_line_names_the_flag(folder, argv, complaint):
    assert mistake(MODEL + "data: {train: [{path: d}]}\n", *argv).startswith(complaint)


def test_a_refusal_by_a_dataclass_names_all_that_set_its_values(folder):
    Path("low.yaml").write_text("trainer: {micro_rows: 3}\n")
    text = MODEL + "base: low.yaml\ntrainer: {steps: 3}\n"
    assert mistake(text, "--trainer.rows=4") == (
        "low.yaml, run.yaml, --trainer.rows: trainer: rows 4 is not a multiple of micro_rows 3"
    )


def write(**files: str) -> None:
    for name, text in files.items():
        Path(f"{name}.yaml").write_text(text, encoding="utf-8")


def test_a_file_lies_over_its_base(folder):
    Path("deep").mkdir()
    Path("deep/low.yaml").write_text("trainer: {rows: 16, steps: 1}\nlora: {rank: 2}\ndata: {train: [{path: a}]}\n")
    write(middle="base: deep/low.yaml\ntrainer: {steps: 2, name: middle}\nlora: null\n")
    settings = load(MODEL + "base: middle.yaml\ntrainer: {name: top}\ndata: {train: [{path: b}, {path: c}]}\n")
    assert settings.trainer == Trainer(rows=16, steps=2, name="top")
    assert settings.lora is None and [source.path for source in settings.data.train] == ["b", "c"]
    Path("deep/up.yaml").write_text("base: ../middle.yaml\n" + MODEL)
    assert load_settings(Settings, "deep/up.yaml").trainer.name == "middle"
    assert load(MODEL + f"base: {folder / 'middle.yaml'}").trainer.name == "middle"


def test_of_several_bases_the_later_wins(folder):
    write(a="trainer: {name: a, steps: 1}", b="trainer: {name: b, rows: 16}")
    assert load(MODEL + "base: [a.yaml, b.yaml]").trainer == Trainer(name="b", steps=1, rows=16)
    assert load(MODEL + "base: [b.yaml, a.yaml]").trainer == Trainer(name="a", steps=1, rows=16)
    assert load(MODEL + "base: []").trainer == Trainer(steps=20)


def test_a_mistake_names_the_file_of_the_chain_that_makes_it(folder):
    write(low="trainer: {steps: x, rows: 8}\nlora: {zzz: 1}\n", middle="base: low.yaml\ntrainer: {rows: y}\n")
    assert mistake(MODEL + "base: middle.yaml\n") == "low.yaml: trainer.steps: expected a whole number, got 'x'"
    assert mistake(MODEL + "base: middle.yaml\n", "--trainer.steps=1") == (
        "middle.yaml: trainer.rows: expected a whole number, got 'y'"
    )
    assert mistake(MODEL + "base: middle.yaml\ntrainer: {steps: 1, rows: 8}\n").startswith(
        "low.yaml: lora.zzz: unknown"
    )
    assert mistake(MODEL + "base: middle.yaml\ntrainer: {steps: z}\n") == (
        "run.yaml: trainer.steps: expected a whole number, got 'z'"
    )


def test_a_cycle_of_bases_is_refused(folder):
    write(a="base: b.yaml", b="base: ./run.yaml")
    assert mistake("base: a.yaml") == "b.yaml: base: a cycle, run.yaml -> a.yaml -> b.yaml -> run.yaml"
    assert mistake("base: run.yaml") == "run.yaml: base: a cycle, run.yaml -> run.yaml"
    write(c=MODEL, d="base: c.yaml", e="base: c.yaml")
    assert load("base: [d.yaml, e.yaml]").model.checkpoint == "c"  # twice the same is no cycle


@pytest.mark.parametrize("base", ["3", "null", "{a: b}", "[3]", "[[a.yaml]]"])
def test_a_base_is_a_path(folder, base):
    write(a="")
    assert mistake(f"base: {base}").startswith("run.yaml: base: expected the path of a file or a list of paths, got ")


def test_files_that_cannot_be_read(folder):
    Path("folder").mkdir()
    for name, kind in (("absent.yaml", FileNotFoundError), ("folder", IsADirectoryError)):
        with pytest.raises(kind) as error:
            load_settings(Settings, name)
        assert error.value.filename == name and error.value.strerror
        write(run=f"base: {name}")
        with pytest.raises(kind, match=r"\(the base of run.yaml\)") as error:
            load_settings(Settings, "run.yaml")
        assert error.value.filename == name


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("model: {checkpoint: c}\ntrainer: [\n", "line 3: not valid YAML: "),
        ("a: 1\nb: c: d\n", "line 2: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n\tb: 2\n", "line 2: not valid YAML: found character '\\t'"),
        ("a: 1\n---\nb: 2\n", "line 2: not valid YAML: "),
        ("a: *nothing\n", "line 1: not valid YAML: found undefined alias"),
        ("a: 1\nb: \0\n", "line 2: the character '\\x00' may not stand here"),
        ("[1, 2]", "expected keys and values, got a list of 2"),
        ("3", "expected keys and values, got 3"),
        ("just words", "expected keys and values, got 'just words'"),
        ("i: 1\ns: x\ni: 2\n", "line 3: i is given twice"),
        ("table:\n  a: 1\n  'a': 2\n", "line 3: a is given twice"),
        ("? [a]\n: 1\n", "line 1: a key must be a word"),
        ("i: 1\ns: !!python/object/apply:os.system [ls]\n", "line 2: the tag !!python/object/apply:os.system is not"),
        ("s: !mine x\n", "line 1: the tag !mine is not allowed"),
        ("s: !!binary aGk=\n", "line 1: the tag !!binary is not allowed"),
        ("names: &n [*n]\n", "line 1: an alias of what it stands in"),
        ("s: " + "[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_no_settings_file_is_one_line(folder, text, complaint):
    assert mistake(text, cls=Any).startswith(f"run.yaml: {complaint}")


def test_bytes_that_are_no_text(folder):
    Path("run.yaml").write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(ValueError, match=r"^run.yaml: line 2: not UTF-8 text \(byte 0xff\)$"):
        load_settings(Any, "run.yaml")
    Path("run.yaml").write_bytes(b"\xef\xbb\xbfi: 5\r\n")
    assert load_settings(Any, "run.yaml").i == 5


TEXTS = [
    *["", " ", "x", "no", "on", "Yes", "null", "~", "true", "1", "1e-5", "3e-4", ".5", "1_0", "010", "1:30", "0x1"],
    *[
        "2024-01-01",
        "a: b",
        "- a",
        "#c",
        "a #c",
        "'q'",
        '"q"',
        "[a]",
        "{a}",
        "&a",
        "*a",
        "!a",
        "%a",
        "@",
        "`",
        "<<",
        "=",
    ],
    *[
        "a\nb",
        "\n",
        " a ",
        "tab\t",
        "naïve 🎈 日本",
        "\x00\x1b",
        "\u2028",
        "\ufeff",
        "\ud800",
        "\x85",
        "---",
        "...",
        "x" * 300,
        "a " * 200,
        "?",
    ],
]
FLOATS = [0.0, -0.0, 1.0, 1e-5, 3e-4, 1e16, 1e22, 1.5e300, 5e-324, 0.1, -2.5, 123456789.123]


def random_settings(draw: random.Random) -> Any:
    text = lambda: draw.choice(TEXTS)  # noqa: E731
    return Any(
        i=draw.choice([0, -3, 10**6, 10**20]),
        f=draw.choice(FLOATS),
        b=draw.random() < 0.5,
        s=text(),
        p=Path(draw.choice(["a", "/b/c", "1e-5", "no", "."])),
        oi=draw.choice([None, 4]),
        of=draw.choice([None, *FLOATS]),
        os=draw.choice([None, text()]),
        number=draw.choice([1, 1.0, *FLOATS]),
        word=draw.choice([7, text()]),
        choice=draw.choice(["no", "on", 3, True, None]),
        names=tuple(text() for _ in range(draw.randrange(4))),
        pair=(draw.randrange(9), draw.choice(FLOATS)),
        grid=tuple(tuple(range(draw.randrange(3))) for _ in range(draw.randrange(3))),
        table={text(): draw.choice([None, 5]) for _ in range(draw.randrange(4))},
        lists=draw.choice([None, {}, {text(): (text(), text())}]),
        either=draw.choice([text(), (text(),)]),
    )


@pytest.mark.parametrize("seed", range(60))
def test_round_trips(folder, seed):
    draw = random.Random(seed)
    settings, other = random_settings(draw), random_settings(draw)
    plain = to_dict(settings)
    for again in (
        from_dict(Any, plain),
        from_dict(Any, json.loads(json.dumps(plain))),
        load(dump_yaml(settings), cls=Any),
    ):
        assert again == settings and to_dict(again) == plain
        assert repr(again) == repr(settings)  # 1 is not 1.0, nor 0.0 -0.0
        assert diff(again, settings) == diff(plain, again) == []
    assert {key.split(".")[0] for key in diff(settings, other)} == {
        key
        for key, value in plain.items()
        if repr(value) != repr(to_dict(other)[key]) and not same(settings, other, key)
    }
    assert from_dict(Any, yaml.safe_load(dump_yaml(settings))).s == settings.s  # other readers see the same text


def same(a: Any, b: Any, key: str) -> bool:
    """Equal though written otherwise: 0.0 and -0.0, or mappings in another order."""
    one, other = getattr(a, key), getattr(b, key)
    return one == other and type(one) is type(other)


def test_round_trip_of_sections(folder):
    settings = load(MODEL + "lora: {rank: 8}\noptimizer: {rows: 16}\ndata: {cache: c, train: [{path: x}]}\n")
    assert from_dict(Settings, to_dict(settings)) == settings == load(dump_yaml(settings))
    assert to_dict(settings)["data"] == {
        "train": [{"path": "x", "weight": 1.0}],
        "packing": "best_fit",
        "cache": "c",
        "shares": {"a": 1.0},
    }


def test_from_dict_is_as_strict(folder):
    plain = to_dict(load(MODEL))
    for change, complaint in (
        ({"trainer": {"steps": "3"}}, "old: trainer.steps: expected a whole number, got '3'"),
        ({"trainer": {"bf16": "yes"}}, "old: trainer.bf16: expected true or false, got 'yes'"),
        ({"trainer": {"stps": 3}}, "old: trainer.stps: unknown; did you mean trainer.steps?"),
        ({"trainer": {3: 3}}, "old: a key must be a word, not 3"),
        ({"lora": {}}, "old: lora.rank: required, but not given"),
        ({"trainer": {"rows": 9}}, "old: trainer: rows 9 is not a multiple of micro_rows 8"),
        ({"trainer": {"learning_rate": float("nan")}}, "old: trainer.learning_rate: expected a number, got nan"),
        ({"model": {"checkpoint": object}}, "old: model.checkpoint: expected text or null, got <class 'object'>"),
    ):
        with pytest.raises(ValueError) as error:
            from_dict(Settings, plain | change, source="old")
        assert str(error.value) == complaint
    with pytest.raises(ValueError, match=r"^settings: expected keys and values, got 'x'$"):
        from_dict(Settings, "x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1}, object(), 1j, b"x"])
def test_to_dict_refuses_what_would_not_come_back(value):
    with pytest.raises(TypeError, match=r"^Source\.weight: .* is not a value of settings$"):
        to_dict(Source(path="x", weight=value))


def test_diff_names_where():
    a = Settings(model=Model(checkpoint="c"), data=Data(train=(Source(path="x"),)), lora=Lora(rank=1))
    b = dataclasses.replace(
        a, data=Data(train=(Source(path="y"),)), lora=None, trainer=Trainer(steps=20, save_every=100.0)
    )
    assert diff(a, b) == ["trainer.save_every", "data.train.0.path", "lora"]
    assert diff(a, dataclasses.replace(a, data=Data())) == ["data.train"]
    assert diff(a, a) == [] and diff(to_dict(a), b) == diff(a, b)
    without = {key: value for key, value in to_dict(a).items() if key != "optimizer"}
    assert diff(a, without) == diff(without, a) == ["optimizer"]


@pytest.mark.parametrize(
    "annotation",
    [
        list[int],
        dict,
        dict[int, str],
        tuple,
        object,
        str | Path,
        Lora | Source,
        Lora | dict[str, int],
        set[str],
        tuple[bytes, ...],
    ],
)
def test_an_annotation_that_cannot_be_read_is_a_defect(annotation):
    cls = dataclasses.make_dataclass("Odd", [("x", annotation, None)])
    with pytest.raises(TypeError, match=r"Odd\.x: settings cannot be annotated"):
        load_settings(cls, None)
    with pytest.raises(TypeError, match=r"Odd\.base: a settings file names its parents by this key"):
        load_settings(dataclasses.make_dataclass("Odd", [("base", str, "")]), None)
    with pytest.raises(TypeError, match="is no dataclass"):
        load_settings(int, None)


def test_a_defect_of_a_dataclass_is_not_dressed_up():
    @dataclass(frozen=True)
    class Broken:
        x: int = 0

        def __post_init__(self):
            raise KeyError("a defect")

    with pytest.raises(KeyError):
        load_settings(Broken, None)


def test_the_help_names_type_default_and_purpose_of_every_key():
    lines = describe(Settings).splitlines()
    keys = {line.partition(":")[0] for line in lines if line.startswith("--")}
    assert {"--model", "--model.checkpoint", "--lora.rank", "--data.train.INDEX.path", "--optimizer.rows"} <= keys
    behind = dict(zip(lines, [*lines[1:], ""]))
    for line, document in (
        ("--model: a section, required", "--model.checkpoint: text or null, required"),
        ("--trainer: a section", "--trainer.learning_rate: a number, default 0.0003"),
        ("--trainer.learning_rate: a number, default 0.0003", "    The peak."),
        ("--trainer.steps: a whole number, default 20", "    How many updates."),
        ("--trainer.rows: a whole number, default 8", "    Rows of a batch."),
        ("--trainer.micro_rows: a whole number, default 8", "    Rows that go through the model at once."),
        ("--trainer.betas: a list of 2 (a number, a number), default [0.9, 0.95]", None),
        ("--trainer.bf16: true or false, default true", None),
        ("--data.packing: 'best_fit' or 'none' or 2 or null, default best_fit", None),
        ("--data.shares: a mapping (each value a number), default {a: 1.0}", None),
        ("--lora: a section or null, default null", "    Adapters of low rank."),
        ("--lora.rank: a whole number, required", None),
        ("--optimizer: a section or text, default adamw", None),
    ):
        assert line in behind and document in (None, behind[line])


def test_help_without_source_and_of_a_class_in_itself():
    assert describe(dataclasses.make_dataclass("Bare", [("x", int, 3)])) == "--x: a whole number, default 3"
    assert describe(Tree).splitlines() == [
        "--leaf: a whole number, default 0",
        "--left: a section or null, default null",
    ]


@dataclass(frozen=True)
class Tree:
    leaf: int = 0
    left: "Tree | None" = None


def test_a_section_may_hold_itself(folder):
    assert load("left: {left: {leaf: 2}}", "--left.leaf=1", cls=Tree) == Tree(left=Tree(leaf=1, left=Tree(leaf=2)))
