"""Runs of DPO and reward models: what they write, what the reference is, and what is refused."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import train
from models.llama import PRESETS, LLaMa, load_pretrained, save_pretrained
from models.llama.scalar import load_scalar
from tests.trainers.contract import difference, flags_of, stepped
from tests.trainers.runs import RECIPES, argv, go, metrics, numbers, preferring, same
from trainers import memory_plan, parts, preference_recipe
from trainers.export import restore_model
from trainers.preference_losses import LOSSES
from trainers.settings import MeshConfig
from utils.settings import describe, load_settings

LORA = {"lora.rank": "2", "lora.alpha": "4"}


@pytest.fixture
def program(capsys, tmp_path, monkeypatch):
    """Call the program in this process; returns its exit code and what it wrote to standard error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*args: str) -> tuple[int, str]:
        capsys.readouterr()
        try:
            train.main(args)
            code = 0
        except SystemExit as end:
            code = end.code
        _, error = capsys.readouterr()
        assert "Traceback" not in error
        return code, error

    return call


def test_it_learns_and_what_is_exported_is_the_state(program, tmp_path):
    flags = preferring(tmp_path, **{"trainer.steps": "12", "trainer.eval_at_start": "true"})
    code, error = program("dpo", *argv(flags))
    folder = tmp_path / "run"
    assert code == 0 and error.splitlines()[-1] == f"wrote {folder / 'hf'}"
    assert re.search(r"pairs: \d+ of 18 prompts cut by \d+ tokens to their last 12", error)
    losses = [row["validation/loss"] for row in metrics(folder) if "validation/loss" in row]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5) and losses[-1] < 0.65
    networks, config, _ = restore_model(RECIPES, folder, None)
    assert same(networks["hf"], load_pretrained(folder / "hf", dtype="float32")) and config.loss.name == "sigmoid"


def test_a_reward_model_learns_and_is_exported_with_its_head(program, tmp_path):
    changes = {"trainer.steps": "12", "checkpoint.metric": "validation/accuracy", "checkpoint.mode": "max"}
    code, error = program("reward", *argv(preferring(tmp_path, **changes)))
    assert code == 0, error
    folder = tmp_path / "run"
    rows = metrics(folder)
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=0.2) and rows[-1]["validation/accuracy"] > 0.9
    networks, *_ = restore_model(RECIPES, folder, None)
    assert same(networks["hf"], load_scalar(folder / "hf"))
    config = json.loads((folder / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]


def test_a_reference_that_is_computed_before_is_the_one_computed_on_the_way(tmp_path, monkeypatch):
    flags = preferring(tmp_path, **{"trainer.steps": "5"})
    before = {"reference.precompute": "true", "reference.cache_dir": str(tmp_path / "kept")}
    runs = {"a": {}, "b": before}
    states = [go("dpo", {**flags, **own, "output_dir": str(tmp_path / name)}) for name, own in runs.items()]
    assert len(list((tmp_path / "kept").glob("reference-*.npy"))) == 2  # of what is trained and of what is validated on
    for one, other in zip(numbers(tmp_path / "a"), numbers(tmp_path / "b"), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    pairs = zip(jax.tree.leaves(states[0].model), jax.tree.leaves(states[1].model), strict=True)
    assert max(np.abs(np.asarray(x) - np.asarray(y)).max() for x, y in pairs) < 1e-4

    kept = next((tmp_path / "kept").glob("reference-*.npy"))
    kept.write_bytes(kept.read_bytes()[:50])  # as a crash may leave it: it is made anew
    assert same(go("dpo", {**flags, **before, "output_dir": str(tmp_path / "c")}), states[1])
    monkeypatch.setattr(preference_recipe.Reference, "scored", None)  # it is not computed again
    assert same(go("dpo", {**flags, **before, "output_dir": str(tmp_path / "d")}), states[1])
    with pytest.raises(TypeError):  # another reference is
        go("dpo", {**flags, **before, "trainer.seed": "1", "output_dir": str(tmp_path / "e")})
    monkeypatch.setattr(parts, "fingerprint", lambda path: "another")
    with pytest.raises(TypeError):  # and that of other tokens
        go("dpo", {**flags, **before, "output_dir": str(tmp_path / "f")})


@pytest.mark.parametrize("how", ["reference.checkpoint", "model.checkpoint"])
def test_a_reference_that_has_changed_is_not_gone_on_with(program, tmp_path, how):
    flags = preferring(tmp_path, **{"trainer.steps": "4"})
    place = tmp_path / "base"
    config = dataclasses.replace(PRESETS["tiny"], num_layers=1, vocab_size=32, layer_windows=(None,))
    base, other = (LLaMa(config, key=jax.random.key(seed)) for seed in (0, 1))
    save_pretrained(base, place, tokenizer_from=flags["tokenizer"])
    flags |= {"model.preset": "null", "model.changes": "{}", "model.checkpoint": str(place)}
    flags[how] = str(place)
    go("dpo", flags, stop_at=2)
    assert program("dpo", *argv(flags | {"trainer.steps": "3"}), "--resume")[0] == 0
    save_pretrained(other, place, tokenizer_from=flags["tokenizer"])
    code, error = program("dpo", *argv(flags), "--resume")
    assert code == 2 and "the reference is not the network that it was when the run began" in error
    flags.pop("reference.checkpoint", None)
    code, error = program("reward", *argv(flags | {"checkpoint.metric": "validation/loss"}), "--resume")
    assert code == 2 and error.endswith("holds a run of dpo: go on with it as dpo\n")


def test_no_usable_row_is_said_before_the_reference_is_asked(program, tmp_path):
    changes = {"reference.precompute": "true", "data.on_bad_row": "skip", "reference.cache_dir": str(tmp_path / "kept")}
    flags = preferring(tmp_path, **changes)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "the cat", "chosen": " sat"}\n' * 9)
    code, error = program("dpo", *argv(flags))
    assert code == 2 and "not one of 8 pairs can be used" in error and "rejected is missing" in error


@pytest.mark.parametrize("changes", [{"loss.name": "kto"}, {"reference.precompute": "true"}], ids=str)
def test_what_the_contract_asks_of_other_references(tmp_path, changes):
    changes = changes | ({"reference.cache_dir": str(tmp_path / "kept")} if "reference.precompute" in changes else {})
    flags = flags_of("dpo", tmp_path, **changes)
    found = difference(*(stepped("dpo", flags | {"trainer.accumulation_steps": n}) for n in ("1", "4")))
    assert found["metrics"] < 2e-5 and found["parameters"] < 2e-5 and found["grad_norm"] > 1e-3, found
    flags = preferring(tmp_path, **{"trainer.steps": "5", **changes})
    whole, cut = ({**flags, "output_dir": str(tmp_path / name)} for name in ("whole", "cut"))
    expected = go("dpo", whole)
    go("dpo", cut, stop_at=2)
    assert same(go("dpo", cut, resume=True), expected) and numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


def test_another_checkpoint_may_be_the_reference(tmp_path):
    flags = preferring(tmp_path, **{"trainer.steps": "2"})
    first = {**flags, "output_dir": str(tmp_path / "first"), "trainer.seed": "3"}
    train.main(["dpo", *argv(first)])
    other = {"reference.checkpoint": str(tmp_path / "first" / "hf")}
    losses = []
    for name, own in (("plain", {}), ("other", other), ("adapted", other | LORA)):
        go("dpo", {**flags, **own, "output_dir": str(tmp_path / name)})
        losses.append(metrics(tmp_path / name)[0]["loss"])
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert abs(losses[1] - losses[0]) > 1e-3 and losses[2] == pytest.approx(losses[1], abs=1e-5)


def test_single_completions_that_are_wanted_or_not(tmp_path):
    flags = preferring(tmp_path, **{"loss.name": "kto", "trainer.steps": "6"})
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    single = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]
    (tmp_path / "single.jsonl").write_text("".join(json.dumps(row) + "\n" for row in single))
    go("dpo", {**flags, "data.train": str(tmp_path / "single.jsonl")})
    found = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert all(0 < row["loss"] < 1 and row["kl"] >= 0 for row in found)
    assert any(row["kl"] > 0 for row in found) and {"rewards/chosen", "rewards/rejected"} <= set(found[0])
    go("dpo", {**flags, "output_dir": str(tmp_path / "of_pairs")})
    assert metrics(tmp_path / "of_pairs")[0]["weight"] == 4


@pytest.mark.parametrize(
    ("command", "changes", "words"),
    [
        ("dpo", {"loss.name": "dpo"}, "dpo"),
        ("dpo", {"loss.name": "simpo", "reference.precompute": "true"}, "simpo has no reference"),
        ("dpo", {"loss.name": "kto", "reference.precompute": "true"}, "does not go with loss.name kto"),
        ("dpo", {"loss.name": "kto", "trainer.batch_size": "1", "trainer.accumulation_steps": "1"}, "at least 2"),
        ("dpo", {"loss.label_smoothing": "0.7"}, "label_smoothing 0.7"),
        ("dpo", {"reference.cache_dir": "x"}, "needs precompute"),
        ("dpo", {"reference.checkpoint": "nowhere"}, "reference.checkpoint nowhere: no such"),
        ("dpo", {"data.max_prompt_length": "30"}, "longer than the model's context"),
        ("dpo", {"data.max_completion_length": "0"}, "max_completion_length"),
        ("dpo", {"tokenizer": "characters"}, "preferences are none"),
        ("dpo", {"checkpoint.metric": "validation/reward"}, "none of a validation's"),
        ("dpo", {"data.train": "nowhere.jsonl"}, "nowhere.jsonl"),
        ("reward", {"loss.centre": "-1"}, "centre -1"),
        ("reward", {"loss.beta": "0.1"}, "beta"),
        ("reward", {"trainer.batch_size": "5"}, "batch_size 5"),
    ],
)
def test_mistakes_are_one_line(program, tmp_path, command, changes, words):
    flags = preferring(tmp_path, **changes)
    flags = flags if "checkpoint.metric" in changes else flags | {"checkpoint.metric": "validation/loss"}
    code, error = program(command, *argv(flags))
    assert code == 2 and words in error.splitlines()[-1] and not (tmp_path / "run").exists()


def test_rows_that_are_no_pairs_are_named(program, tmp_path):
    flags = preferring(tmp_path)
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "the cat", "completion": " sat", "label": true}\n' * 4)
    code, error = program(
        "reward",
        *argv(
            flags
            | {
                "data.validation_fraction": "0",
                "checkpoint.metric": "null",
                "checkpoint.keep_best": "0",
                "trainer.patience": "null",
            }
        ),
    )
    assert code == 2 and f"{path}:1: " in error and "unpaired preference" in error
    path.write_text("")
    code, error = program("dpo", *argv(flags))
    assert code == 2 and "pairs.jsonl" in error.splitlines()[-1]


def test_the_memory_of_a_reference_is_in_the_table(tmp_path: Path):
    steps = []
    for changes in ({}, {"reference.precompute": "true"}, LORA, {"loss.name": "simpo"}):
        config = load_settings(RECIPES["dpo"].config, None, preferring(tmp_path, **changes))
        mesh = parts.make_mesh(MeshConfig())
        llama = parts.network_config(config.model, type("T", (), {"vocab_size": 40}))
        step = RECIPES["dpo"].memory_step(config, llama, mesh)
        steps.append(step.others)
        assert step.rows == 8 and re.search(r"has [\d,]+ pairs, in 2 micro-batches", memory_plan.report(step, mesh)[-1])
    assert steps[0] > 0 and steps[1:] == [0, 0, 0]


# The page for its users.


@pytest.fixture(scope="module")
def page(repo_root: Path) -> str:
    return (repo_root / "docs" / "preferences.md").read_text()


def test_settings_and_losses_of_the_page_exist(page):
    known = set()
    for command in ("dpo", "reward"):
        known |= set(re.findall(r"^--([\w.]+):", describe(RECIPES[command].config), re.MULTILINE))
    sections = {key.partition(".")[0] for key in known}
    named = {text.partition(":")[0] for text in re.findall(r"`([^`\n]+)`", page)}
    named = {text for text in named if re.fullmatch(r"\w+(\.\w+)+", text) and text.partition(".")[0] in sections}
    assert len(named) > 12 and not named - known
    table = page.partition("| `loss.name` |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == {*LOSSES, "kto"}


def test_metrics_of_the_page_are_those_that_are_written(page, tmp_path):
    written = set()
    common = {"weight", "grad_norm", "learning_rate", "skipped", "loss"}
    for name in ("sigmoid", "orpo", "kto"):
        go("dpo", preferring(tmp_path, **{"loss.name": name, "trainer.steps": "2", "output_dir": str(tmp_path / name)}))
        written |= {key for row in metrics(tmp_path / name) for key in row if "validation/" not in key}
    table = page.partition("| metric | meaning | healthy |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert named == written - {"step", "data_wait", "peak_memory_bytes"}
    assert common <= written


def test_the_example_of_the_page_runs(page, tmp_path, monkeypatch, capsys):
    [source] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(source.splitlines()) < 40
    flags = preferring(tmp_path)
    model = LLaMa(PRESETS["tiny"], key=jax.random.key(0))
    save_pretrained(model, tmp_path / "model", tokenizer_from=flags["tokenizer"])
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(source, "docs/preferences.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [str(step) for step in range(1, 11)]
    assert all(0 <= float(line.split()[1]) <= 1 for line in lines) and int(names["state"].step) == 10
