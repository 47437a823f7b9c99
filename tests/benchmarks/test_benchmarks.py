"""The benchmarks run, and what they measure that is a promise and not a speed."""

import re
import shutil
import subprocess
import sys

import pytest


def run(repo_root, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_loading_a_large_checkpoint_needs_no_second_copy_in_memory(repo_root, tmp_path):
    if shutil.disk_usage(tmp_path).free < 4 * 10**9:
        pytest.skip("needs 4 GB of disk")
    out = run(repo_root, "benchmarks.load", "--dtype", "float32", "--dir", str(tmp_path / "checkpoint"))
    weights, extra = map(float, re.search(r"weights (\S+) GiB, peak (\S+) GiB", out).groups())
    assert weights > 4.5
    assert extra < 1


@pytest.mark.slow
def test_decoding_is_timed_beside_transformers(repo_root):
    pytest.importorskip("transformers")
    flags = (
        "--peer",
        "hf",
        "--shapes",
        "tiny",
        "--batches",
        "1,3",
        "--runs",
        "1",
        "--new_tokens",
        "8",
        "--depths",
        "1,2",
    )
    out = run(repo_root, "benchmarks.decode", *flags)
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| tiny")]
    assert [int(row[1]) for row in rows] == [1, 3]
    assert all(float(row[3]) > 0 and float(row[5]) > 0 for row in rows)
    assert re.search(r"2 layers take \d+\.\d+x the time of 1", out)


@pytest.mark.slow
def test_starting_is_timed_beside_transformers(repo_root):
    pytest.importorskip("transformers")
    out = run(repo_root, "benchmarks.startup", "--peer", "hf", "--shape", "tiny", "--runs", "1")
    assert re.search(r"\| ropewalk \| \d", out) and re.search(r"\| transformers \| \d", out)


@pytest.mark.slow
def test_parity_of_every_network(repo_root):
    pytest.importorskip("transformers")
    out = run(repo_root, "benchmarks.parity")
    differences = [float(line.split("|")[2]) for line in out.splitlines()[2:]]
    assert len(differences) == 12 and max(differences) <= 1e-5
