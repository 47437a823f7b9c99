"""The benchmarks of training run, and both sides of each do the same work."""

import dataclasses
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import train
from benchmarks.train_sides import DOCUMENTS, Work, batch_rows
from trainers.settings import RunConfig
from utils.settings import load_settings


def run(repo_root, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def table(out: str) -> list[list[str]]:
    """Cells of the rows of a Markdown table, without its head."""
    lines = [line for line in out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


@pytest.fixture
def work(tmp_path) -> Work:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 50}))
    return Work(folder=str(tmp_path), batch="3x24", dtype="float32", device="cpu", remat=None, peer_remat=False)


def test_packed_rows_are_whole_documents(work):
    rows = batch_rows(dataclasses.replace(work, batch="3x24:packed"))
    for segments, positions, weights in zip(rows["segments_BT"], rows["positions_BT"], rows["weights_BT"]):
        lengths = [np.count_nonzero(segments == number) for number in range(1, DOCUMENTS + 1)]
        assert sum(lengths) == 24 and min(lengths) > 0
        assert positions.tolist() == [place for length in lengths for place in range(length)]
        ends = np.cumsum(lengths)[:-1] - 1
        assert np.flatnonzero(weights == 0).tolist() == ends.tolist()
    np.testing.assert_array_equal(rows["tokens_BT"][:, 1:], rows["targets_BT"][:, :-1])


def test_plain_rows_are_one_document_each(work):
    rows = batch_rows(work)
    assert (rows["segments_BT"] == 1).all() and (rows["weights_BT"] == 1).all()
    np.testing.assert_array_equal(rows["positions_BT"], np.tile(np.arange(24), (3, 1)))


@pytest.mark.parametrize("theirs", ([9.0, 8.9], [9.0002, 8.8], [math.nan, 8.8]))
def test_sides_that_do_not_do_the_same_are_not_timed(theirs):
    figures = {"ropewalk": {"losses": [9.0, 8.8]}, "hf eager": {"losses": [9.00005, 8.8005]}, "failed": {"error": "no"}}
    train._check_losses(figures, "float32")
    with pytest.raises(ValueError, match="losses of ropewalk and other differ"):
        train._check_losses(figures | {"other": {"losses": theirs}}, "float32")


def test_the_torch_loop_has_the_learning_rate_of_the_recipe():
    pytest.importorskip("torch")
    from benchmarks import shakespeare, shakespeare_torch
    from trainers.optimizers import make_schedule

    told = shakespeare._read_settings("text.txt", 2000)
    settings = shakespeare_torch.Settings(**told, save_to="", compiled=False)
    config = load_settings(RunConfig, shakespeare.ROOT / shakespeare.CONFIG)
    ours = make_schedule(config.optimizer, learning_rate=config.trainer.learning_rate, num_steps=2000)
    for step in (0, 50, 99, 100, 1000, 1999):
        assert shakespeare_torch.learning_rate(settings, step) == pytest.approx(float(ours(step)), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ((), ("--plain",)))
def test_the_step_is_timed_beside_transformers(repo_root, flags):
    pytest.importorskip("transformers")
    sizes = ("--shapes", "tiny", "--batches", "2x16,2x32:packed", "--steps", "1", "--rounds", "1")
    rows = table(run(repo_root, "benchmarks.train", "--peer", "hf", *sizes, *flags))
    sides = ["ropewalk", "hf eager", "hf compiled"]
    assert [row[2] for row in rows if "huge pages" not in row[2]] == sides * 2
    assert not flags or not any("huge pages" in row[2] for row in rows)
    for row in rows:
        if row[3] != "failed":  # where torch finds no compiler
            seconds, rate = float(row[4]), float(row[7])
            tokens = math.prod(map(int, row[1].removesuffix(":packed").split("x")))
            assert seconds > 0 and rate == pytest.approx(tokens / seconds, rel=0.5)
    ours = [float(row[8]) for row in rows if row[2] == "ropewalk"]
    assert not sys.platform.startswith("linux") or all(0.05 < gib < 4 for gib in ours)


@pytest.mark.slow
def test_a_step_in_half_precision_and_with_less_stored(repo_root):
    flags = ("--shapes", "tiny", "--batches", "2x16", "--steps", "1", "--rounds", "1", "--dtype", "bfloat16")
    [row] = table(run(repo_root, "benchmarks.train", *flags, "--remat", "block"))
    assert row[:3] == ["tiny", "2x16", "ropewalk"] and float(row[4]) > 0


@pytest.mark.slow
def test_a_character_model_is_trained_beside_torch(repo_root, tmp_path):
    pytest.importorskip("torch")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    draw = random.Random(0)
    text = " ".join(draw.choice(words) for _ in range(4000))
    (tmp_path / "text.txt").write_text(text)
    flags = ("--text", str(tmp_path / "text.txt"), "--steps", "60", "--runs", "1")
    rows = table(run(repo_root, "benchmarks.shakespeare", *flags))
    assert [row[0] for row in rows] == ["ropewalk", "torch", "torch-compiled"]
    losses = [float(row[3]) for row in rows]
    assert all(float(row[1]) > 0 for row in rows)
    assert max(losses) < math.log(len(set(text))) - 0.5, "the loss of a uniform guess has hardly fallen"
    assert max(losses) - min(losses) < 0.2, "the same network, optimizer and schedule end elsewhere"
