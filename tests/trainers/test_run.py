"""A run as a whole: resumed it is the run that was never interrupted; what fails says so; what it writes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from models.llama import load_pretrained, load_tokenizer
from tests.trainers.runs import RECIPES, go, metrics, numbers, pretraining, same, tuning, words
from trainers.checkpoints import Checkpointer
from trainers.export import export, restore_model
from trainers.observers import RunError
from trainers.pretrain_trainer import PretrainTrainer
from trainers.run import prepare
from trainers.settings import RunConfig
from trainers.sft_trainer import SFTTrainer
from utils.settings import load_settings

LORA = {"lora.rank": "2", "lora.alpha": "4", "lora.dropout": "0.1"}


# Resuming.


@pytest.mark.parametrize(
    ("command", "make", "changes"),
    [
        ("pretrain", pretraining, {}),
        ("sft", tuning, {}),
        pytest.param("sft", tuning, LORA, marks=pytest.mark.slow),
    ],
    ids=["pretrain", "sft", "lora"],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path, command, make, changes):
    flags = make(tmp_path, **changes)
    whole, cut = ({**flags, "output_dir": str(tmp_path / name)} for name in ("whole", "cut"))
    config = load_settings(RunConfig, None, whole)
    run = prepare(command, RECIPES[command], config, resume=False, cache_dir=tmp_path)
    assert 30 < sum(map(len, run.course.data.sources)) < 14 * 4  # an epoch ends on the way

    expected = go(command, whole)
    assert int(go(command, cut, stop_at=5).step) == 5  # between two evaluations and two regular saves
    assert int(go(command, cut, resume=True, stop_at=6).step) == 11
    state = go(command, cut, resume=True)

    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert [row["step"] for row in metrics(tmp_path / "cut") if "loss" in row] == list(range(1, 15))
    assert same(state, expected)
    assert _waited(tmp_path / "cut") == _waited(tmp_path / "whole")
    held = [Checkpointer(tmp_path / name / "checkpoints").steps() for name in ("whole", "cut")]
    assert held[0][-1] == held[1][-1] == 14


def _waited(folder: Path) -> dict:
    info = json.loads((folder / "checkpoints" / "14" / "info" / "data.json").read_text())
    return info["data_states"][0]["evaluator"]


def test_other_dropout_keys_give_other_losses(tmp_path: Path):
    """That the comparison above can fail: the losses depend on dropout and on the order of the rows."""
    flags = pretraining(tmp_path, **{"trainer.steps": "2"})
    losses = []
    for name, changes in (("a", {}), ("b", {"loss.dropout": "0.2"}), ("c", {"trainer.seed": "1"})):
        go("pretrain", {**flags, **changes, "output_dir": str(tmp_path / name)})
        losses.append([row["loss"] for row in metrics(tmp_path / name) if "loss" in row])
    assert losses[0][0] != losses[1][0] and losses[0][0] != losses[2][0]


def test_resuming_sees_sparse_records_as_they_would_have_been(tmp_path: Path):
    flags = pretraining(tmp_path, **{"trainer.log_every": "3", "trainer.steps": "8"})
    whole, cut = ({**flags, "output_dir": str(tmp_path / name)} for name in ("whole", "cut"))
    go("pretrain", whole)
    go("pretrain", cut, stop_at=4)
    go("pretrain", cut, resume=True)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(tmp_path: Path):
    """As kill -9 leaves it: records behind the checkpoint, a half-written line, a half-written checkpoint."""
    flags = pretraining(tmp_path)
    whole, cut = ({**flags, "output_dir": str(tmp_path / name)} for name in ("whole", "cut"))
    go("pretrain", whole)
    go("pretrain", cut, stop_at=9)
    folder = tmp_path / "cut"
    shutil.rmtree(folder / "checkpoints" / "9")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    (folder / "checkpoints" / "12.orbax-checkpoint-tmp").mkdir()
    said = []
    go("pretrain", cut, resume=True, said=said)
    assert "going on from step 8" in said
    assert numbers(folder) == numbers(tmp_path / "whole")


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path):
    flags = pretraining(tmp_path, **{"checkpoint.keep_last": "2"})
    go("pretrain", flags, stop_at=6)
    folder = tmp_path / "run"
    for file in (folder / "checkpoints" / "6" / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:-500])
    said = []
    go("pretrain", flags, resume=True, said=said)
    assert any("6" in line and "step 4 is restored instead" in line for line in said), said
    whole = {**flags, "output_dir": str(tmp_path / "whole")}
    go("pretrain", whole)
    assert numbers(folder) == numbers(tmp_path / "whole")


def test_resuming_a_run_that_is_through_changes_nothing(tmp_path: Path):
    flags = pretraining(tmp_path, **{"trainer.steps": "3"})
    state = go("pretrain", flags)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert same(go("pretrain", flags, resume=True), state)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_resuming_without_a_checkpoint_begins(tmp_path: Path):
    said = []
    go("pretrain", pretraining(tmp_path, **{"trainer.steps": "1"}), resume=True, said=said)
    assert said[0] == "no checkpoint yet: beginning at step 0"


@pytest.mark.parametrize(
    ("changes", "words_of_the_line"),
    [
        ({"trainer.batch_size": "8"}, "batches of 4 rows, these have 8"),
        ({"trainer.seed": "5"}, "seed changed"),
        ({"data.sequence_length": "16"}, "row length"),
        ({"model.changes.intermediate_size": "64"}, "another state was saved"),
        ({"optimizer.name": "lion"}, "another state was saved"),
    ],
)
def test_a_run_cannot_go_on_as_another(tmp_path: Path, changes, words_of_the_line):
    flags = pretraining(tmp_path, **{"trainer.steps": "2"})
    go("pretrain", flags)
    with pytest.raises(ValueError, match=words_of_the_line):
        go("pretrain", flags | {"trainer.steps": "4"} | changes, resume=True)


def test_a_run_cannot_go_on_with_other_data(tmp_path: Path):
    flags = pretraining(tmp_path, **{"trainer.steps": "2"})
    go("pretrain", flags)
    (tmp_path / "text.txt").write_text(words(300, seed=3))
    with pytest.raises(ValueError, match="saved place is in other data"):
        go("pretrain", flags, resume=True)


def test_a_run_cannot_go_on_by_another_command(tmp_path: Path):
    flags = pretraining(tmp_path, **{"trainer.steps": "1"})
    go("pretrain", flags)
    with pytest.raises(ValueError, match="holds a run of pretrain: go on with it as pretrain"):
        go("sft", flags, resume=True)


def test_validation_may_be_added_when_a_run_goes_on(tmp_path: Path):
    flags = pretraining(tmp_path, **{"trainer.steps": "2", "trainer.patience": "null", "data.validation_fraction": "0"})
    flags |= {"checkpoint.metric": "null", "checkpoint.keep_best": "0"}
    go("pretrain", flags)
    (tmp_path / "held.txt").write_text(words(60, seed=9))
    said = []
    go(
        "pretrain",
        flags | {"data.validation": str(tmp_path / "held.txt"), "trainer.steps": "4"},
        resume=True,
        said=said,
    )
    assert any("data.validation" in line and "trainer.steps" in line for line in said)
    assert any("validation/loss" in row for row in metrics(tmp_path / "run"))


# How a run ends.


def test_patience_ends_a_run_and_its_resumption(tmp_path: Path):
    flags = pretraining(tmp_path, **{"trainer.patience": "2", "trainer.learning_rate": "1e-12"})
    flags |= {"trainer.eval_at_start": "true", "loss.dropout": "0", "model.dtype": "float32"}
    flags |= {"trainer.max_grad_norm": "1e-30"}  # no update is large enough to change a weight
    said = []
    state = go("pretrain", flags, said=said)
    assert int(state.step) == 4 and said[-1] == "stopped at step 4: 2 evaluations without a lower loss"
    assert Checkpointer(tmp_path / "run" / "checkpoints").latest() == 4
    assert int(go("pretrain", flags, resume=True).step) == 4
    assert int(go("pretrain", flags | {"trainer.patience": "3"}, resume=True).step) == 6


def test_steps_that_are_not_finite_end_a_run(tmp_path: Path):
    flags = pretraining(tmp_path, **{"trainer.learning_rate": "1e30", "trainer.max_grad_norm": "null"})
    flags |= {"trainer.max_bad_steps": "3", "trainer.patience": "null", "optimizer.schedule": "constant"}
    with pytest.raises(RunError, match=r"not finite for 3 steps up to step \d+: lower the learning rate"):
        go("pretrain", flags)
    rows = metrics(tmp_path / "run")
    assert rows[-1]["grad_norm"] is None  # strict JSON has no NaN
    assert Checkpointer(tmp_path / "run" / "checkpoints").latest() == 4  # what was saved before is there


def test_what_fails_on_the_way_is_a_run_error_and_loses_nothing(tmp_path: Path, monkeypatch):
    flags = pretraining(tmp_path)
    saves = []

    def save(self, step, *args, **kwargs):
        saves.append(step)
        if step == 8:
            raise OSError(28, "No space left on device", str(tmp_path))
        return original(self, step, *args, **kwargs)

    original = Checkpointer.save
    monkeypatch.setattr(Checkpointer, "save", save)
    with pytest.raises(RunError, match="No space left on device"):
        go("pretrain", flags)
    monkeypatch.undo()
    assert saves == [4, 8] and Checkpointer(tmp_path / "run" / "checkpoints").steps() == [4]
    whole = {**flags, "output_dir": str(tmp_path / "whole")}
    assert same(go("pretrain", flags, resume=True), go("pretrain", whole))
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


def test_an_option_that_is_refused_as_the_step_is_compiled_is_no_failure_on_the_way(tmp_path: Path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("not on this device")

    with monkeypatch.context() as refused, pytest.raises(ValueError, match="not on this device"):
        refused.setattr(PretrainTrainer, "loss", refuse)
        go("pretrain", pretraining(tmp_path))
    monkeypatch.setattr(Checkpointer, "save", refuse)
    with pytest.raises(RunError, match="not on this device"):
        go("pretrain", pretraining(tmp_path))


# What is refused before anything begins.


def test_a_folder_with_a_run_is_not_written_to(tmp_path: Path):
    flags = pretraining(tmp_path, **{"trainer.steps": "1"})
    go("pretrain", flags)
    for name in ("metrics.jsonl", "checkpoints"):  # one of the two is enough
        with pytest.raises(ValueError, match="holds a run: go on with it by --resume"):
            go("pretrain", flags)
        path = tmp_path / "run" / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    go("pretrain", flags)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"data.sequence_length": "33"}, "sequence_length 33 is longer than the model's context of 32"),
        ({"mesh.fsdp": "3"}, r"mesh of data=-1, fsdp=3, tensor=1, sequence=1 does not fit 1 devices"),
        ({"model.preset": "tyni"}, "'tyni' is none of tiny, "),
        ({"model.changes.hidden_sise": "32"}, "hidden_sise, which is no field"),
        ({"model.changes.vocab_size": "5"}, "tokenizer has 18 ids but the network only 5"),
        ({"model.changes.num_kv_heads": "4"}, "num_heads 2 .*num_kv_heads 4"),
        ({"data.validation_fraction": "0.9999"}, "holding out 0.9999 of"),
        ({"optimizer.warmup": "20"}, "do not fit into 14 steps"),
        ({"data.chat_template": "nosuch"}, "nosuch"),
        ({"tokenizer": "no/such/folder"}, "no/such/folder"),
        ({"model.preset": "null", "model.changes": "{}", "model.checkpoint": "no/such"}, "no/such"),
        (
            {"model.preset": "null", "model.changes": "{}", "model.checkpoint": "no/such", "tokenizer": "null"},
            "model.checkpoint no/such: no such file or folder",
        ),
        ({"data.train": "no/such/file.txt"}, "no/such/file.txt"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, changes, error):
    with pytest.raises((ValueError, OSError), match=error) as caught:
        go("pretrain", pretraining(tmp_path, **changes))
    assert "\n" not in str(caught.value) and not isinstance(caught.value, RunError)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_output_folder_that_cannot_be_is_refused_before_the_data_are_read(tmp_path: Path):
    (tmp_path / "file").write_text("")
    flags = pretraining(tmp_path, output_dir=str(tmp_path / "file" / "run"), **{"data.train": "not looked at"})
    with pytest.raises(NotADirectoryError, match="file is a file"):
        go("pretrain", flags)


def test_the_characters_of_an_attempt_that_failed_are_not_kept(tmp_path: Path):
    flags = pretraining(tmp_path, **{"trainer.steps": "1"})
    (tmp_path / "wrong.txt").write_text("xyz " * 100)
    with pytest.raises(ValueError):
        go("pretrain", flags | {"data.train": str(tmp_path / "wrong.txt"), "data.sequence_length": "99"})
    go("pretrain", flags)
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer")
    assert tokenizer.decode(tokenizer.encode("sat on the red hill")) == "sat on the red hill"


# Data.


def test_epochs_become_steps(tmp_path: Path):
    flags = pretraining(tmp_path, **{"trainer.steps": "null", "trainer.epochs": "1.5"})
    config = load_settings(RunConfig, None, flags)
    run = prepare("pretrain", RECIPES["pretrain"], config, resume=False, cache_dir=tmp_path)
    rows = len(run.course.data.sources[0])
    assert run.num_steps == -(-3 * rows // 8)


def test_an_epoch_of_a_weighted_mixture_ends_with_the_first_of_its_sets(tmp_path: Path):
    for name, count in (("a", 400), ("b", 100)):
        (tmp_path / f"{name}.txt").write_text(words(count))
    flags = pretraining(tmp_path, **{"trainer.steps": "null", "trainer.epochs": "1"})
    flags["data.train"] = f"[{{path: {tmp_path}/a.txt, weight: 1}}, {{path: {tmp_path}/b.txt, weight: 1}}]"
    config = load_settings(RunConfig, None, flags)
    run = prepare("pretrain", RECIPES["pretrain"], config, resume=False, cache_dir=tmp_path)
    few = min(map(len, run.course.data.sources))
    assert abs(run.num_steps - 2 * few / 4) <= 1


def test_what_the_user_says_is_never_learnt(tmp_path: Path):
    """Other targets where the user speaks change no gradient; where the assistant does, they do."""
    flags = tuning(tmp_path, **{"loss.dropout": "0", "trainer.accumulation_steps": "1"})
    turns = [("user", 3), ("assistant", 2), ("user", 1), ("assistant", 3)]
    rows = [{"messages": [{"role": role, "content": words(n, 10 * i + n)} for role, n in turns]} for i in range(20)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}"
    (tmp_path / "template.jinja").write_text(template)
    flags |= {"data.train": str(tmp_path / "chats.jsonl"), "data.chat_template": str(tmp_path / "template.jinja")}
    flags |= {"data.sequence_length": "128", "model.changes.max_position_embeddings": "128"}
    run = prepare("sft", RECIPES["sft"], load_settings(RunConfig, None, flags), resume=False, cache_dir=tmp_path)
    batch = next(run.course.data)
    users, learnt = (batch.segments_BT > 0) & (batch.weights_BT == 0), batch.weights_BT > 0
    assert users.sum() > 20 < learnt.sum()

    @jax.jit
    def gradients(targets_BT):
        return jax.grad(lambda model: run.trainer.loss(model, replace(batch, targets_BT=targets_BT), None).sum)(
            run.model
        )

    other = (batch.targets_BT + 1) % run.model.config.vocab_size
    here = gradients(batch.targets_BT)
    assert same(gradients(np.where(users, other, batch.targets_BT)), here)
    assert not same(gradients(np.where(learnt, other, batch.targets_BT)), here)
    run.course.data.close()


# Results.


def test_what_is_exported_is_the_state(tmp_path: Path):
    flags = pretraining(tmp_path, **{"checkpoint.keep_last": "3", "optimizer.warmup": "4"})
    state = go("pretrain", flags, stop_at=9)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "text.txt").unlink()  # neither the data nor the folder's old place are needed
    networks, config, tokenizer = restore_model(RECIPES, moved, None)
    assert same(networks, {"hf": state.model}) and config.trainer.steps == 14
    assert export(networks, tmp_path / "out", tokenizer_path=tokenizer, base=None) == [tmp_path / "out" / "hf"]
    assert same(load_pretrained(tmp_path / "out" / "hf", dtype="float32"), state.model)
    assert load_tokenizer(tmp_path / "out" / "hf").decode(load_tokenizer(tokenizer).encode("red hill")) == "red hill"

    older, *_ = restore_model(RECIPES, moved, 4)
    assert not same(older, {"hf": state.model})
    with pytest.raises(ValueError, match=r"no checkpoint of step 5, only of (2, )?4, 8, 9"):
        restore_model(RECIPES, moved, 5)


def test_adapters_are_exported_beside_the_merged_model(tmp_path: Path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = {**pretraining(tmp_path), "output_dir": str(tmp_path / "base"), "trainer.steps": "1"}
    trained = {"hf": go("pretrain", base).model}
    export(trained, tmp_path / "base", tokenizer_path=tmp_path / "base" / "tokenizer", base=None)
    flags = tuning(tmp_path, tokenizer="null", **{"model.preset": "null", "model.changes": "{}"}, **LORA)
    flags |= {"model.checkpoint": str(tmp_path / "base" / "hf"), "trainer.learning_rate": "3e-2", "trainer.steps": "4"}
    state = go("sft", flags)
    networks, config, tokenizer = restore_model(RECIPES, tmp_path / "run", None)
    model = networks["hf"]
    assert same(model, state.model)
    written = export(networks, tmp_path / "run", tokenizer_path=tokenizer, base=config.model.checkpoint)
    assert written == [tmp_path / "run" / "hf", tmp_path / "run" / "adapter"]

    ids = np.array([[1, 4, 2, 5, 3, 6, 2]])
    ours = np.asarray(model(ids)[0])
    plain = AutoModelForCausalLM.from_pretrained(flags["model.checkpoint"])
    with torch.no_grad():
        before = plain(torch.tensor(ids)).logits.numpy()
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf")(torch.tensor(ids)).logits.numpy()
        adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter")(torch.tensor(ids)).logits.numpy()
    assert np.abs(before - ours).max() > 1e-2
    assert np.abs(merged - ours).max() < 1e-4 and np.abs(adapted - ours).max() < 1e-4


def test_a_network_without_a_hugging_face_architecture_is_trained_and_said_so(tmp_path: Path):
    flags = pretraining(tmp_path, **{"model.changes.gated": "false", "trainer.steps": "1"})
    config = load_settings(RunConfig, None, flags)
    run = prepare("pretrain", RECIPES["pretrain"], config, resume=False, cache_dir=tmp_path)
    assert not run.exportable and "hf/ will not be written" in run.describe()[-1]
    go("pretrain", flags)
    with pytest.raises(ValueError, match="no architecture for this network"):
        restore_model(RECIPES, tmp_path / "run", None)


# Records.


def test_records_have_what_is_promised(tmp_path: Path):
    pytest.importorskip("tensorboardX")
    flags = pretraining(tmp_path, **{"trainer.steps": "4", "trainer.eval_at_start": "true", "log.tensorboard": "true"})
    go("pretrain", flags)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 4]
    trained = [row for row in rows if "loss" in row]
    always = {"loss", "perplexity", "accuracy", "entropy", "grad_norm", "learning_rate", "packing", "skipped"}
    rates = {"tokens_per_second", "step_seconds", "data_wait"}
    for row in trained:
        assert always <= row.keys() and "mfu" not in row  # the peak of this kind of device is not known
        assert row["perplexity"] == pytest.approx(np.exp(row["nll"])) and row["skipped"] == 0
        assert rates & row.keys() == (set() if row["step"] == 1 else rates)
        assert row.get("peak_memory_bytes", 1) > 0
    validated = [row for row in rows if "validation/loss" in row]
    assert [row["step"] for row in validated] == [0, 2, 4]
    assert validated[0]["validation/perplexity"] == pytest.approx(np.exp(validated[0]["validation/nll"]))
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_mfu_is_recorded_where_the_chip_is_known(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("trainers.run.peak_flops", lambda kind, dtype: 1e9)
    go("pretrain", pretraining(tmp_path, **{"trainer.steps": "3"}))
    assert all(row["mfu"] > 0 for row in metrics(tmp_path / "run") if row["step"] > 1 and "loss" in row)


def test_evaluating_at_the_start_changes_no_number_of_the_run(tmp_path: Path):
    flags = pretraining(tmp_path, **{"trainer.steps": "3"})
    a, b = ({**flags, "output_dir": str(tmp_path / name)} for name in "ab")
    assert same(go("pretrain", a), go("pretrain", b | {"trainer.eval_at_start": "true"}))
    assert numbers(tmp_path / "b")[1:] == numbers(tmp_path / "a")


def test_a_part_of_the_validation_data_is_drawn_from_all_of_them_and_stays_the_same(tmp_path: Path, monkeypatch):
    flags = tuning(tmp_path, **{"trainer.steps": "4", "data.validation_fraction": "0"})
    for name in "ab":
        rows = [{"prompt": name, "completion": words(1 + i % 9, seed=i)} for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags["data.validation"] = f"[{tmp_path}/a.jsonl, {tmp_path}/b.jsonl]"
    seen = []

    def evaluate(self, model, batches):
        seen.append(list(batches))
        return {"loss": 1.0}

    monkeypatch.setattr(SFTTrainer, "evaluate", evaluate)
    go("sft", flags)
    first, second = seen
    assert len(first) == 2 and same(first, second)
    lengths = np.concatenate([(batch.segments_BT == 1).sum(1) for batch in first])
    assert set(np.concatenate([batch.tokens_BT[:, 0] for batch in first])) == {1, 2}, "of the first set alone"
    assert lengths.min() < 20 < lengths.max(), "the longest documents alone"


def test_random_weights_come_from_the_seed(tmp_path: Path):
    config = load_settings(RunConfig, None, pretraining(tmp_path))
    other = replace(config, trainer=replace(config.trainer, seed=1))
    a, b, c = (
        prepare("pretrain", RECIPES["pretrain"], own, resume=False, cache_dir=tmp_path).model
        for own in (config, config, other)
    )
    assert same(a, b) and not same(a, c)
    assert len(jax.tree.leaves(a)) > 5
