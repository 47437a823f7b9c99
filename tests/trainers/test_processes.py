"""Runs of several processes: real ones on loopback, each with four CPU devices, started by the command line."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.trainers import runs

GENEROUS = 600.0  # seconds, for what has no limit
PROMISED = 60.0  # seconds in which a process has to end after another one


class Processes:
    """The processes of one run. `flags` are those of each process; a single one gets eight devices and no others."""

    def __init__(self, root: Path, logs: Path, command: str, flags: Sequence[Mapping[str, str]], *more: str):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        logs.mkdir(exist_ok=True)
        self._logs, self.all = logs, []
        for index, own in enumerate(flags):
            place = {"coordinator": f"127.0.0.1:{port}", "num_processes": str(len(flags)), "process_id": str(index)}
            own = own | (place if len(flags) > 1 else {})
            devices = f"--xla_force_host_platform_device_count={8 // len(flags)}"
            with self._file(index).open("w") as said:
                self.all.append(
                    subprocess.Popen(
                        [sys.executable, "train.py", command, *runs.argv(own), *more],
                        cwd=root,
                        env=os.environ | {"XLA_FLAGS": devices, "TPU_SKIP_MDS_QUERY": "1"},
                        stdout=said,
                        stderr=subprocess.STDOUT,
                    )
                )

    def _file(self, index: int) -> Path:
        return self._logs / f"{index}.txt"

    def said(self, index: int) -> list[str]:
        return self._file(index).read_text().splitlines()

    def until(self, event: Callable[[], object]) -> None:
        """Wait for it, while all processes are there."""
        end = time.monotonic() + GENEROUS
        while not event():
            assert all(process.poll() is None for process in self.all), [self.said(i) for i in range(len(self.all))]
            assert time.monotonic() < end
            time.sleep(0.002)

    def codes(self, seconds: float = GENEROUS) -> list[int]:
        return [process.wait(seconds) for process in self.all]


@pytest.fixture
def started(repo_root, tmp_path) -> Iterator[Callable[..., Processes]]:
    """Starts processes; those that are left at the end of the test are killed."""
    begun: list[Processes] = []

    def start(command: str, flags: Sequence[Mapping[str, str]], *more: str) -> Processes:
        begun.append(Processes(repo_root, tmp_path / f"logs{len(begun)}", command, flags, *more))
        return begun[-1]

    yield start
    for process in (process for own in begun for process in own.all):
        process.kill()
        process.wait()


def pretraining(folder: Path, **changes: str) -> dict[str, str]:
    return runs.pretraining(folder, **{"trainer.batch_size": "16", **changes})


def endless(folder: Path, **changes: str) -> dict[str, str]:
    """One layer, and steps until somebody ends it."""
    return pretraining(
        folder,
        **{
            "trainer.steps": "1000000",
            "trainer.eval_every": "1000000",
            "checkpoint.metric": "null",
            "checkpoint.keep_best": "0",
            "trainer.patience": "null",
            **changes,
        },
    )


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints that are whole."""
    where = folder / "checkpoints"
    return sorted(int(path.name) for path in where.iterdir() if path.name.isdecimal()) if where.is_dir() else []


def done(folder: Path) -> int:
    """How many lines of metrics are written."""
    return len((folder / "metrics.jsonl").read_text().splitlines()) if (folder / "metrics.jsonl").is_file() else 0


def losses(folder: Path) -> list[tuple[int, str, float]]:
    names = ("loss", "validation/loss")
    return [(row["step"], name, row[name]) for row in runs.metrics(folder) for name in names if name in row]


def assert_same_losses(a: Path, b: Path) -> None:
    """But for the order of sums over devices, which is another between processes than within one."""
    ours, theirs = losses(a), losses(b)
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    np.testing.assert_allclose([row[2] for row in ours], [row[2] for row in theirs], rtol=2e-6)


def test_a_signal_at_one_process_saves_one_step_of_both(started, tmp_path):
    """And the rest of a whole run: both train, process 0 alone writes and speaks."""
    flags = endless(tmp_path, **{"checkpoint.every_steps": "1000000"})
    two = started("pretrain", [flags, flags])
    two.until(lambda: done(tmp_path / "run") >= 3)
    two.all[1].send_signal(signal.SIGTERM)
    assert two.codes() == [143, 143], (two.said(0), two.said(1))
    (saved,) = steps(tmp_path / "run")
    assert saved == runs.metrics(tmp_path / "run")[-1]["step"]
    assert two.said(0)[-1] == f"interrupted and saved at step {saved}: go on with --resume"
    assert two.said(1) == ["finishing the step and saving; once more to end at once"]


def test_other_data_in_one_process_is_refused_by_both(started, tmp_path):
    flags = pretraining(tmp_path)
    (tmp_path / "other.txt").write_text(runs.words(351))
    two = started("pretrain", [flags, flags | {"data.train": str(tmp_path / "other.txt")}])
    assert two.codes() == [2, 2]
    assert two.said(0) == two.said(1) == ["train.py: process 1 of 2 has other data than process 0"]


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_and_two_where_one_was(started, tmp_path):
    flags = pretraining(tmp_path, **{"checkpoint.keep_last": "9"})
    for name, count in (("of one", 1), ("of two", 2)):
        own = flags | {"output_dir": str(tmp_path / name)}
        assert set(started("pretrain", [own] * count).codes()) == {0}
    assert_same_losses(tmp_path / "of one", tmp_path / "of two")
    ours, theirs = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("of one", "of two"))
    for name in ours | theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6)
    for before, after, count in (("of two", "two, one", 1), ("of one", "one, two", 2)):
        folder = tmp_path / after
        shutil.copytree(tmp_path / before, folder, ignore=shutil.ignore_patterns("12", "14", "hf"))
        own = flags | {"output_dir": str(folder)}
        process = started("pretrain", [own] * count, "--resume")
        assert set(process.codes()) == {0}
        assert "going on from step 8" in process.said(0)
        assert_same_losses(tmp_path / "of one", folder)
        assert_same_losses(tmp_path / "of two", folder)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "loss"), [("dpo", "sigmoid"), ("dpo", "kto"), ("reward", None)])
def test_preferences_in_two_processes_are_those_of_one(started, tmp_path, command, loss):
    """References and baselines are of rows of both, and padded to the longest of them."""
    flags = runs.preferring(tmp_path, **{"trainer.batch_size": "16", "trainer.steps": "4"})
    flags |= {} if loss is None else {"loss.name": loss}
    for name, count in (("of one", 1), ("of two", 2)):
        process = started(command, [flags | {"output_dir": str(tmp_path / name)}] * count)
        assert set(process.codes()) == {0}, process.said(0)
    assert_same_losses(tmp_path / "of one", tmp_path / "of two")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ((1, 2, 2, 2), (1, 1, 1, 8)))
def test_axes_that_span_processes(started, tmp_path, mesh):
    """With adapters, which are exported beside the weights: all of them are gathered from both processes."""
    axes = {f"mesh.{name}": str(size) for name, size in zip(("data", "fsdp", "tensor", "sequence"), mesh)}
    flags = runs.tuning(tmp_path, **{"trainer.batch_size": "16", "lora": "{rank: 2, alpha: 4}"}) | axes
    for name, count in (("of one", 1), ("of two", 2)):
        own = flags | {"output_dir": str(tmp_path / name)}
        process = started("sft", [own] * count)
        assert set(process.codes()) == {0}, process.said(0)
    assert_same_losses(tmp_path / "of one", tmp_path / "of two")
    for file in ("hf/model.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = (load_file(tmp_path / name / file) for name in ("of one", "of two"))
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ("step", "save"))
@pytest.mark.parametrize("index", (0, 1))
def test_a_killed_process_ends_the_other(started, tmp_path, index, moment):
    folder = tmp_path / "run"
    flags = endless(tmp_path, **{"checkpoint.every_steps": "3"})
    two = started("pretrain", [flags, flags])
    two.until(lambda: steps(folder))
    if moment == "save":
        two.until(lambda: list((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*")))
    two.all[index].kill()
    assert two.all[1 - index].wait(PROMISED) == 1
    assert two.all[index].wait() == -signal.SIGKILL
    last = steps(folder)[-1]
    why = f"train.py: process {index} of 2 has ended; the last checkpoint is step {last}: go on with --resume"
    assert two.said(1 - index)[-1] == why
    assert not any("train.py" in line or "***" in line for line in two.said(1 - index)[:-1])
    state = runs.go("pretrain", flags, resume=True, stop_at=1)
    assert int(state.step) == last + 1
    assert not [path for path in (folder / "checkpoints").iterdir() if not path.name.isdecimal()]


@pytest.mark.slow
@pytest.mark.parametrize("index", (0, 1))
def test_a_process_that_fails_ends_the_other_with_its_reason(started, tmp_path, index):
    """One process cannot read its data; the other, which can, waits for it."""
    flags = pretraining(tmp_path, **{"tokenizer": str(tmp_path / "characters")})
    runs.tuning(tmp_path)
    each = [dict(flags), dict(flags)]
    each[index]["data.train"] = str(tmp_path / "absent.txt")
    two = started("pretrain", each)
    codes = two.codes(PROMISED)
    assert (codes[index], codes[1 - index]) == (2, 1)
    (own,), (others,) = two.said(index), two.said(1 - index)
    assert "absent.txt" in own
    assert re.fullmatch(rf"train\.py: process {index} of 2 has ended: .*absent\.txt.*; nothing has been saved", others)


@pytest.mark.slow
def test_a_folder_of_their_own_is_refused(started, tmp_path):
    runs.tuning(tmp_path)
    flags = pretraining(tmp_path, tokenizer=str(tmp_path / "characters"))
    two = started("pretrain", [flags, flags | {"output_dir": str(tmp_path / "mine")}])
    assert two.codes() == [2, 2]
    assert "mine of process 1 is not that of process 0: it must be on a disk that all processes share" in two.said(1)[0]


@pytest.mark.slow
def test_other_settings_are_refused(started, tmp_path):
    flags = pretraining(tmp_path)
    two = started("pretrain", [flags, flags | {"trainer.learning_rate": "1e-4"}])
    assert two.codes() == [2, 2]
    line = "train.py: process 1 has other settings than process 0: trainer.learning_rate"
    assert two.said(0) == two.said(1) == [line]


@pytest.mark.slow
def test_the_second_signal_ends_at_once(started, tmp_path):
    flags = endless(tmp_path)
    two = started("pretrain", [flags, flags])
    two.until(lambda: done(tmp_path / "run") >= 3)
    two.all[0].send_signal(signal.SIGSTOP)  # so that no step ends and nothing is agreed on
    two.all[1].send_signal(signal.SIGINT)
    time.sleep(1)
    two.all[1].send_signal(signal.SIGINT)
    two.all[0].send_signal(signal.SIGCONT)
    codes = two.codes()
    assert codes in ([1, -signal.SIGINT], [130, 130]), (codes, two.said(0), two.said(1))


def test_grpo_is_for_one_process(started, tmp_path):
    flags = runs.reinforcing(tmp_path)
    two = started("grpo", [flags, flags])
    assert two.codes() == [2, 2]
    assert two.said(0) == ["train.py: grpo runs in one process, of any number of devices, and not in 2"]
