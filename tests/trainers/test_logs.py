"""Writers of metrics: what is in the files, also after an interruption, and how they refuse."""

import glob
import json
import re
import struct
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from trainers import logs
from trainers.logs import JsonlWriter, MultiWriter, SilentWriter, TensorBoardWriter, WandbOptions, WandbWriter


def strict_lines(path: Path) -> list[dict]:
    """The lines of a file as JSON, without Python's own NaN and Infinity."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def write_steps(writer, steps, offset=0.0):
    for step in steps:
        writer.write(step, {"loss": step + offset})


class TestJsonl:
    def test_each_write_is_a_line_at_once(self, tmp_path):
        path = tmp_path / "run" / "metrics.jsonl"
        writer = JsonlWriter(path)
        writer.write(1, {"loss": 2.5, "lr": 1})
        assert path.read_text() == '{"step": 1, "loss": 2.5, "lr": 1.0}\n'
        writer.write(jnp.int32(2), {"loss": jnp.float32(0.5)})
        assert strict_lines(path)[1] == {"step": 2, "loss": 0.5}
        writer.close()

    def test_what_json_cannot_say_is_null(self, tmp_path):
        writer = JsonlWriter(tmp_path / "m.jsonl")
        writer.write(1, {"a": float("nan"), "b": float("-inf"), "c": jnp.inf, "d": 1e300})
        assert strict_lines(tmp_path / "m.jsonl") == [{"step": 1, "a": None, "b": None, "c": None, "d": 1e300}]

    def test_a_resumed_run_reads_like_one_never_interrupted(self, tmp_path):
        whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
        writer = JsonlWriter(whole)
        write_steps(writer, range(1, 9))
        writer.close()
        writer = JsonlWriter(cut)
        write_steps(writer, range(1, 8))  # the checkpoint is of step 5
        writer.close()
        cut.write_text(cut.read_text() + '{"step": 8, "lo')  # killed here
        writer = JsonlWriter(cut, resume_step=5)
        assert [row["step"] for row in strict_lines(cut)] == [1, 2, 3, 4, 5]
        write_steps(writer, range(6, 9))
        writer.close()
        assert cut.read_bytes() == whole.read_bytes()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.jsonl", "whole.jsonl"]

    def test_minus_one_begins_again(self, tmp_path):
        path = tmp_path / "m.jsonl"
        writer = JsonlWriter(path)
        write_steps(writer, [0, 1])
        writer.close()
        JsonlWriter(path, resume_step=-1).close()
        assert path.read_text() == ""
        JsonlWriter(path).close()  # nothing is lost here

    def test_resuming_where_there_is_no_file_yet(self, tmp_path):
        writer = JsonlWriter(tmp_path / "m.jsonl", resume_step=7)
        write_steps(writer, [8])
        assert strict_lines(tmp_path / "m.jsonl") == [{"step": 8, "loss": 8.0}]

    def test_another_run_is_not_overwritten(self, tmp_path):
        path = tmp_path / "m.jsonl"
        path.write_text('{"step": 1}\n')
        with pytest.raises(FileExistsError, match=r"m\.jsonl holds the metrics of another run"):
            JsonlWriter(path)
        assert path.read_text() == '{"step": 1}\n'

    @pytest.mark.parametrize("line", ["a poem", '{"loss": 1}', "[1]", '{"step": "1"}', "7"])
    def test_a_file_of_something_else_is_left_alone(self, tmp_path, line):
        path = tmp_path / "m.jsonl"
        path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 9}}\n')
        before = path.read_text()
        with pytest.raises(ValueError, match=r"m\.jsonl:2: no line of metrics"):
            JsonlWriter(path, resume_step=1)
        assert path.read_text() == before

    def test_step_is_no_name_of_a_metric(self, tmp_path):
        with pytest.raises(ValueError, match="step"):
            JsonlWriter(tmp_path / "m.jsonl").write(1, {"step": 3.0})
        assert (tmp_path / "m.jsonl").read_text() == ""

    @pytest.mark.parametrize("resume_step", [None, 3])
    def test_where_nothing_can_be_written(self, tmp_path, resume_step):
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match=r"^cannot write \S*/file/m\.jsonl: [A-Z][\w ]+$"):
            JsonlWriter(tmp_path / "file" / "m.jsonl", resume_step=resume_step)
        (tmp_path / "folder").mkdir()
        with pytest.raises(OSError, match=r"^cannot write .*folder: Is a directory$"):
            JsonlWriter(tmp_path / "folder", resume_step=resume_step)

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
    def test_a_full_disk_is_told(self):
        with pytest.raises(OSError, match=r"^cannot write /dev/full: No space left on device$"):
            JsonlWriter("/dev/full").write(1, {"loss": 1.0})


def events(folder: Path) -> list:
    """The events of all files of a folder, oldest file first, read without TensorBoard."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for name in sorted(glob.glob(f"{folder}/events.*")):
        data = Path(name).read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])  # length, its checksum, the event, its checksum
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


class TestTensorBoard:
    @pytest.fixture(autouse=True)
    def installed(self):
        pytest.importorskip("tensorboardX")

    def test_scalars_are_in_the_events(self, tmp_path):
        writer = TensorBoardWriter(tmp_path)
        writer.write(3, {"loss": jnp.float32(1.5), "lr": 0.25})
        writer.write(4, {"loss": float("inf")})
        writer.close()
        values = [(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value]
        assert values == [(3, "loss", 1.5), (3, "lr", 0.25), (4, "loss", float("inf"))]

    def test_resuming_hides_what_came_behind(self, tmp_path):
        for resume_step in (None, 5):
            writer = TensorBoardWriter(tmp_path, resume_step=resume_step)
            writer.write(6, {"loss": 1.0})
            writer.close()
        starts = [e.step for e in events(tmp_path) if e.HasField("session_log") and e.session_log.status == 1]
        assert starts == [6]  # TensorBoard drops earlier events from this step on

    def test_where_nothing_can_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match=r"^cannot write .*/file/tb: [A-Z]"):
            TensorBoardWriter(tmp_path / "file" / "tb")


class TestWandb:
    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch, tmp_path):
        pytest.importorskip("wandb")
        for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")

    def test_resuming_goes_on_with_the_same_run(self, tmp_path):
        import wandb

        options = WandbOptions(project="ropes", name="first", mode="offline")
        writer = WandbWriter(tmp_path, options, config={"lr": 0.5})
        run_id, run = (tmp_path / "wandb-run-id.txt").read_text().strip(), writer._run
        writer.write(3, {"loss": jnp.float32(1.5)})
        assert (run.id, run.project, run.name, run.config["lr"]) == (run_id, "ropes", "first", 0.5)
        assert run.settings.mode == "offline" and run.step == 3
        writer.close()
        wandb.teardown()  # its own process writes the last of the file
        (stored,) = (tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
        assert b"ropes" in stored.read_bytes()
        assert re.search(rb"loss.{0,4}1\.5", stored.read_bytes(), re.DOTALL)

        writer = WandbWriter(tmp_path, options, resume_step=3)
        assert writer._run.id == run_id
        writer.close()
        writer = WandbWriter(tmp_path, options)
        assert writer._run.id != run_id
        writer.close()

    def test_a_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match=r"^cannot write .*/file: File exists$"):
            WandbWriter(tmp_path / "file", WandbOptions(project="ropes"))

    def test_a_refusal_is_one_line(self, tmp_path, monkeypatch):
        import wandb

        def refuse(**_):
            raise wandb.errors.UsageError("No API key configured.")

        monkeypatch.setattr(wandb, "init", refuse)
        with pytest.raises(ValueError, match=r"^Weights & Biases: No API key configured\.$"):
            WandbWriter(tmp_path, WandbOptions(project="ropes"))


@pytest.mark.parametrize(("options", "what"), [({"project": ""}, "project"), ({"project": "p", "mode": "of"}, "'of'")])
def test_senseless_options_are_refused(options, what):
    with pytest.raises(ValueError, match=what):
        WandbOptions(**options)


@pytest.mark.parametrize(("module", "extra"), [("tensorboardX", "tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    wanted = {"tensorboard": True} if extra == "tensorboard" else {"wandb": WandbOptions(project="p")}
    with pytest.raises(ValueError, match=rf'pip install "ropewalk\[{extra}\]"$'):
        logs.open_writers(tmp_path, **wanted)
    logs.open_writers(tmp_path).close()  # the attempt has left nothing in the way


class Recorder:
    def __init__(self, fails=False):
        self.rows, self.closed, self.fails = [], 0, fails

    def write(self, step, metrics):
        self.rows.append((step, dict(metrics)))

    def close(self):
        self.closed += 1
        if self.fails:
            raise OSError("full")


def test_all_writers_get_the_values_converted_once():
    class Counted:
        conversions = 0

        def __float__(self):
            Counted.conversions += 1
            return 1.5

    one, two = Recorder(), Recorder()
    MultiWriter([one, two]).write(7, {"loss": Counted()})
    assert one.rows == two.rows == [(7, {"loss": 1.5})]
    assert Counted.conversions == 1 and isinstance(one.rows[0][1]["loss"], float)


def test_all_writers_are_closed_even_if_one_cannot_be():
    writers = [Recorder(), Recorder(fails=True), Recorder()]
    with pytest.raises(OSError, match="full"):
        MultiWriter(writers).close()
    assert [writer.closed for writer in writers] == [1, 1, 1]


def test_only_the_first_process_writes(tmp_path):
    writer = logs.open_writers(tmp_path / "other", process_index=1, tensorboard=True, wandb=WandbOptions(project="p"))
    assert isinstance(writer, SilentWriter)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert not (tmp_path / "other").exists()


def test_opened_writers_write_where_they_are_looked_for(tmp_path):
    pytest.importorskip("tensorboardX")
    for resume_step, steps in ((None, [1, 2]), (1, [2, 3])):
        writer = logs.open_writers(tmp_path, resume_step=resume_step, tensorboard=True)
        write_steps(writer, steps)
        writer.close()
    assert [row["step"] for row in strict_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert len([e for e in events(tmp_path / "tensorboard") if e.summary.value]) == 4


def test_what_was_opened_before_a_refusal_is_closed(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(JsonlWriter, "close", lambda self: closed.append(self))
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match="tensorboardX"):
        logs.open_writers(tmp_path, tensorboard=True)
    assert len(closed) == 1
