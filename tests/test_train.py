"""The training program: its command line, its exit codes, signals, and runs of it that are killed."""

import json
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import train
import trainers.export
import trainers.packed_data
from models.llama import load_pretrained, load_tokenizer
from tests.trainers.runs import argv, metrics, numbers, pretraining, same, tuning
from trainers.checkpoints import Checkpointer
from trainers.observers import Saver


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def program(capsys) -> Callable[..., tuple[int, str]]:
    """Call the program in this process; returns its exit code and what it wrote to standard error."""

    def call(*args: str) -> tuple[int, str]:
        capsys.readouterr()
        try:
            train.main(args)
            code = 0
        except SystemExit as end:
            code = end.code
        call.out, error = capsys.readouterr()
        assert "Traceback" not in error
        return code, error

    return call


def start(*args: str, **options) -> subprocess.Popen:
    """The program as a process of its own."""
    root = Path(train.__file__).parent
    return subprocess.Popen([sys.executable, "train.py", *args], cwd=root, stderr=subprocess.PIPE, text=True, **options)


def wait_for_steps(process: subprocess.Popen, folder: Path, count: int) -> None:
    """Until so many lines of metrics are there, or the process has ended."""
    path = folder / "metrics.jsonl"
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < count):
        time.sleep(0.01)


# Mistakes.


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            ["pretrian"],
            "'pretrian' is none of the commands pretrain, sft, dpo, reward, ppo, grpo, distill, export",
        ),
        (["pretrain", "--config"], "--config needs a value"),
        (["pretrain", "--config", "--resume"], "--config needs a value"),
        (["pretrain", "--config=a", "--config=b"], "--config is given twice"),
        (["pretrain", "--config", "no/such.yaml"], "no/such.yaml: No such file or directory"),
        (["sft"], "output_dir: required, but not given"),
        (["sft", "input.txt"], "input.txt"),
        (["export", "--run", "x"], "export needs --run, the output folder of a run, and --output, a new folder"),
        (["export", "--run=x", "--output=y", "--step=last"], "--step must be a whole number, not 'last'"),
        (["export", "--run=x", "--output=y", "--stop=1"], "unknown '--stop=1'"),
        (["export", "--run=no/such", "--output=y"], "no/such/checkpoints: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(program, args, line):
    code, error = program(*args)
    assert code == 2 and error.startswith("train.py: ") and error.count("\n") == 1 and line in error


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"trainer.learning_rat": "1"}, "--trainer.learning_rat: unknown; did you mean --trainer.learning_rate?"),
        ({"trainer.learning_rate": "fast"}, "--trainer.learning_rate: expected a number"),
        ({"trainer.batch_size": "0"}, "batch_size must be positive, not 0"),
        ({"trainer.batch_size": "5"}, "batch_size 5 is not a multiple of accumulation_steps 2"),
        ({"trainer.epochs": "1"}, "give steps or epochs and null for the other, not 14 and 1.0"),
        ({"data.train": "no/such.txt"}, "no such file, folder or data set: no/such.txt"),
        ({"data.train": "no/such.bin", "tokenizer": "TOKENIZER"}, "no such file, folder or data set: no/such.bin"),
        ({"data.train": "empty.txt"}, "empty.txt is empty"),
        ({"data.train": "blank.jsonl"}, "blank.jsonl has no rows"),
        ({"data.train": "bad.jsonl"}, "bad.jsonl:3: "),
        ({"data.train": "bad.jsonl", "tokenizer": "TOKENIZER"}, "bad.jsonl:3: "),
        ({"data.train": "short.txt"}, "short.txt"),
        ({"data.sequence_length": "64"}, "data.sequence_length 64 is longer than the model's context of 32"),
        ({"mesh.data": "2"}, "a mesh of data=2, fsdp=1, tensor=1, sequence=1 does not fit 1 devices"),
        ({"tokenizer": "nowhere"}, "nowhere: no such file or folder"),
        ({"tokenizer": "TOKENIZER", "model.changes.vocab_size": "3"}, "3"),
        ({"output_dir": "empty.txt"}, "empty.txt is a file"),
        ({"output_dir": "/proc/run"}, "/proc"),
        ({"model.checkpoint": "x"}, "give checkpoint or preset"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_and_code_2(program, tmp_path: Path, changes, line, monkeypatch):
    flags = tuning(tmp_path)
    tokenizer = flags["tokenizer"]
    flags = pretraining(tmp_path) | changes
    flags = {key: tokenizer if value == "TOKENIZER" else value for key, value in flags.items()}
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("")
    Path("blank.jsonl").write_text("\n\n")
    Path("short.txt").write_text("a")
    Path("bad.jsonl").write_text('{"text": "cat sat"}\n{"text": "dog ran"}\n{"text": 3}\n{"text": "sun"}\n')
    code, error = program("pretrain", *argv(flags))
    assert code == 2 and error.splitlines()[-1].startswith("train.py: ") and line in error.splitlines()[-1], error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_value_in_a_file_is_named_with_the_file(program, tmp_path: Path):
    path = tmp_path / "own.yaml"
    path.write_text("trainer:\n  learning_rate: fast\n")
    flags = pretraining(tmp_path)
    del flags["trainer.learning_rate"]
    code, error = program("pretrain", "--config", str(path), *argv(flags))
    assert code == 2 and f"{path}: trainer.learning_rate: expected" in error and "fast" in error


def test_bad_rows_are_skipped_and_counted_where_that_is_wanted(program, tmp_path: Path):
    flags = tuning(tmp_path, **{"trainer.steps": "1", "data.on_bad_row": "skip"})
    path = Path(flags["data.train"])
    path.write_text(path.read_text() + '{"prompt": 3}\n[1]\n' + path.read_text())
    code, error = program("sft", *argv(flags))
    assert code == 0 and f"2 bad rows skipped, the first {path}:71: " in error
    flags = pretraining(tmp_path, output_dir=str(tmp_path / "other"), **{"trainer.steps": "1"})
    (tmp_path / "text.jsonl").write_text('{"text": 3}\n' + json.dumps({"text": (tmp_path / "text.txt").read_text()}))
    flags |= {"data.train": str(tmp_path / "text.jsonl"), "data.on_bad_row": "skip"}
    code, error = program("pretrain", *argv(flags))  # a tokenizer is made of the good rows
    assert code == 0 and "1 bad rows skipped" in error


def test_help(program):
    for args in ([], ["--help"], ["-h"]):
        assert program(*args) == (0, "") and program.out.startswith(
            "Pretraining, fine-tuning, learning from preferences"
        )
    assert program("sft", "--help")[0] == 0 and "eval_at_start" in program.out and "keep_best" in program.out
    assert program("grpo", "--help")[0] == 0
    assert all(name in program.out for name in ("max_completion_length", "rewards", "dynamic_sampling", "epsilon_high"))
    assert program("export", "--help") == (0, "") and "--step" in program.out


# Runs.


def test_a_run_its_files_and_what_may_come_behind_it(program, tmp_path: Path):
    changes = pretraining(tmp_path, **{"checkpoint.keep_last": "4"})
    flags = argv(changes)
    code, error = program("pretrain", *flags)
    folder = tmp_path / "run"
    assert code == 0 and error.splitlines()[-1] == f"wrote {folder / 'hf'}" and "14 steps" in error
    assert {path.name for path in folder.iterdir()} == {"metrics.jsonl", "checkpoints", "tokenizer", "hf"}

    code, error = program("pretrain", *flags)
    assert code == 2 and "holds a run: go on with it by --resume" in error

    code, error = program("export", "--run", str(folder), "--output", str(tmp_path / "newest"))
    assert code == 0 and same(load_pretrained(tmp_path / "newest" / "hf"), load_pretrained(folder / "hf"))
    code, error = program("export", f"--run={folder}", "--step=8", f"--output={tmp_path / 'older'}")
    assert code == 0 and not same(load_pretrained(tmp_path / "older" / "hf"), load_pretrained(folder / "hf"))
    tokenizer = load_tokenizer(tmp_path / "older" / "hf")
    assert tokenizer.decode(tokenizer.encode("the red hill")) == "the red hill"
    code, error = program("export", f"--run={folder}", "--step=7", f"--output={tmp_path / 'none'}")
    assert code == 2 and "no checkpoint of step 7, only of " in error and not (tmp_path / "none").exists()

    code, error = program("pretrain", *argv(changes | {"trainer.batch_size": "8"}), "--resume")
    assert code == 2 and "these have 8" in error.splitlines()[-1]
    code, error = program("pretrain", *flags, "--resume")
    assert code == 0 and "going on from step 14" in error


def test_steps_that_are_not_finite_are_code_1(program, tmp_path: Path):
    flags = {"trainer.learning_rate": "1e30", "trainer.max_grad_norm": "null", "trainer.max_bad_steps": "2"}
    code, error = program("pretrain", *argv(pretraining(tmp_path, **flags)))
    assert code == 1 and "were not finite for 2 steps up to step" in error.splitlines()[-1]


def test_a_full_disk_is_code_1_and_loses_nothing(program, tmp_path: Path):
    flags = pretraining(tmp_path, **{"optimizer.schedule": "constant"})
    assert program("pretrain", *argv(flags | {"trainer.steps": "4"}))[0] == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        for steps in ("14", "8"):  # a save on the way, and the last one
            code, error = program("pretrain", *argv(flags | {"trainer.steps": steps}), "--resume")
            last = error.splitlines()[-1]
            assert code == 1 and "8: could not be saved" in last and "too large" in last, error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Checkpointer(tmp_path / "run" / "checkpoints").steps() == [4]
    assert program("pretrain", *argv(flags), "--resume")[0] == 0
    whole = flags | {"output_dir": str(tmp_path / "whole")}
    assert program("pretrain", *argv(whole))[0] == 0
    trained = [[row for row in numbers(tmp_path / name) if "loss" in row] for name in ("run", "whole")]
    assert trained[0] == trained[1]


# Signals.


def interrupt_after(monkeypatch, step: int) -> None:
    """Press Ctrl-C as that step ends."""
    original = Saver.__call__

    def call(self, number, *args):
        if number == step:
            signal.raise_signal(signal.SIGINT)
        return original(self, number, *args)

    monkeypatch.setattr(Saver, "__call__", call)


def test_ctrl_c_saves_and_says_how_to_go_on(program, tmp_path: Path, monkeypatch):
    flags = argv(pretraining(tmp_path))
    with monkeypatch.context() as pressed:
        interrupt_after(pressed, 7)
        code, error = program("pretrain", *flags)
    assert code == 130 and error.splitlines()[-1] == "interrupted and saved at step 7: go on with --resume"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert Checkpointer(tmp_path / "run" / "checkpoints").latest() == 7 and not (tmp_path / "run" / "hf").exists()


def test_ctrl_c_on_the_last_step_is_too_late(program, tmp_path: Path, monkeypatch):
    interrupt_after(monkeypatch, 2)
    code, error = program("pretrain", *argv(pretraining(tmp_path, **{"trainer.steps": "2"})))
    assert code == 0 and (tmp_path / "run" / "hf" / "config.json").exists(), error


@pytest.mark.parametrize(
    ("module", "name"),
    [(trainers.packed_data, "open_datasets"), (trainers.export, "export")],
    ids=["set-up", "export"],
)
def test_ctrl_c_before_and_behind_training_is_an_interrupt(program, tmp_path: Path, monkeypatch, module, name):
    monkeypatch.setattr(module, name, lambda *_, **__: signal.raise_signal(signal.SIGINT))
    code, error = program("pretrain", *argv(pretraining(tmp_path, **{"trainer.steps": "1"})))
    assert (code, error.splitlines()[-1]) == (130, "train.py: interrupted")


@pytest.mark.slow
def test_sigterm_to_a_process_and_resuming_it(program, tmp_path: Path):
    flags = pretraining(tmp_path, **{"trainer.steps": "40", "checkpoint.every_steps": "10"})
    whole, cut = ({**flags, "output_dir": str(tmp_path / name)} for name in ("whole", "cut"))
    assert program("pretrain", *argv(whole))[0] == 0
    process = start("pretrain", *argv(cut))
    wait_for_steps(process, tmp_path / "cut", 6)
    process.send_signal(signal.SIGTERM)
    error = process.communicate()[1]
    assert process.returncode == 143 and "interrupted and saved at step" in error
    assert len(metrics(tmp_path / "cut")) < len(metrics(tmp_path / "whole"))
    assert program("pretrain", *argv(cut), "--resume")[0] == 0
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert same(load_pretrained(tmp_path / "cut" / "hf"), load_pretrained(tmp_path / "whole" / "hf"))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path):
    process = start("pretrain", *argv(pretraining(tmp_path, **{"trainer.steps": "1000000"})))
    wait_for_steps(process, tmp_path / "run", 4)
    process.send_signal(signal.SIGSTOP)  # both are pending when it goes on
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    line = next(line for line in process.stderr if "once more to end at once" in line)
    process.send_signal(signal.SIGINT)
    rest = process.communicate()[1]
    assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in line + rest


@pytest.mark.slow
def test_kill_at_any_moment_and_resuming(program, tmp_path: Path):
    """Killed three times, at moments drawn at random, with a save at every other step; then the same numbers."""
    changes = {"trainer.steps": "60", "checkpoint.every_steps": "2", "checkpoint.keep_last": "2"}
    flags = pretraining(tmp_path, **changes)
    whole, cut = ({**flags, "output_dir": str(tmp_path / name)} for name in ("whole", "cut"))
    assert program("pretrain", *argv(whole))[0] == 0
    moments = random.Random(0)
    for seen in (3, 12, 30):
        process = start("pretrain", *argv(cut), "--resume")
        wait_for_steps(process, tmp_path / "cut", seen)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.communicate()
    assert program("pretrain", *argv(cut), "--resume")[0] == 0
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert same(load_pretrained(tmp_path / "cut" / "hf"), load_pretrained(tmp_path / "whole" / "hf"))


# The real thing.


def test_heavy_libraries_are_imported_where_they_are_needed_alone(repo_root: Path):
    code = (
        "import sys, train, trainers.run, inference.setup\n"
        "heavy = 'torch transformers peft datasets pyarrow pandas wandb tensorboardX tokenizers sentencepiece'\n"
        "print([name for name in heavy.split() if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_fine_tuning_lowers_the_loss_on_held_out_answers_by_a_quarter(
    program, repo_root: Path, assets_dir: Path, tmp_path: Path
):
    code, error = program(
        "sft",
        f"--config={repo_root / 'configs' / 'sft_small.yaml'}",
        f"--model.checkpoint={assets_dir / 'stories260k' / 'hf'}",
        f"--data.train={assets_dir / 'data' / 'llamafactory' / 'alpaca_en_demo.json'}",
        f"--output_dir={tmp_path / 'run'}",
        "--data.sequence_length=256",
        "--trainer.epochs=null",
        "--trainer.steps=80",
        "--trainer.eval_every=40",
        "--trainer.eval_at_start",
        "--checkpoint.every_steps=80",
    )
    assert code == 0, error
    losses = {row["step"]: row["validation/loss"] for row in metrics(tmp_path / "run") if "validation/loss" in row}
    assert min(losses.values()) <= 0.75 * losses[0]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")
    assert tokenizer("red hill").input_ids == load_tokenizer(tmp_path / "run" / "hf").encode("red hill", add_bos=True)
