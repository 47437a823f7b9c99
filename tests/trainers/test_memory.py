"""Peaks of memory by part, from a record that the tests write, and from that of this process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainers.memory import PartMemory, set_peak_back
from trainers.metrics import Throughput
from trainers.observers import Recorder
from trainers.progress import ProgressBar


class Process:
    """So much memory is in use, and so much was at its peak."""

    def __init__(self, *, can_set_back: bool = True):
        self.now = self.record = 100
        self.can_set_back = can_set_back

    def use(self, number: int) -> None:
        """For a moment."""
        self.record = max(self.record, number)

    def read(self) -> int:
        return self.record

    def set_back(self) -> bool:
        if self.can_set_back:
            self.record = self.now
        return self.can_set_back

    def parts(self) -> PartMemory:
        return PartMemory(read=self.read, set_back=self.set_back)


def step(process: Process, memory: PartMemory, **use: int) -> None:
    """Parts in their order, "train" between and behind them, "pause" none of them."""
    for name, number in use.items():
        if name == "train":
            process.use(number)
            continue
        with memory.part(None if name == "pause" else name):
            process.use(number)


def test_each_part_has_its_own_peak():
    process = Process()
    memory = process.parts()
    process.use(5000)  # the weights are read: no part of any step
    for more in (0, 7):
        step(process, memory, rollout=900 + more, scoring=300, train=600 - more)
    assert memory.report() == {"memory/rollout": 907, "memory/scoring": 300, "memory/train": 600}
    assert memory.peak() == 5000


def test_pauses_are_no_part():
    process = Process()
    memory = process.parts()
    step(process, memory, rollout=300, train=400, pause=9000, scoring=200)
    process.use(450)
    assert memory.report() == {"memory/rollout": 300, "memory/train": 450, "memory/scoring": 200}
    assert memory.peak() == 9000


def test_figures_are_of_the_time_since_the_last_restart():
    process = Process()
    memory = process.parts()
    step(process, memory, rollout=900, train=8000)  # which compiles
    memory.restart()
    step(process, memory, train=200, rollout=300)
    assert memory.report() == {"memory/rollout": 300, "memory/train": 200}
    memory.restart()
    step(process, memory, train=250)  # the second update of a rollout
    assert memory.report() == {"memory/train": 250}


def test_without_parts_nothing_is_set_back():
    process = Process()
    memory = process.parts()
    process.use(500)
    step(process, memory, pause=700, train=600)
    memory.restart()
    assert memory.report() == {} and process.record == memory.peak() == 700


def test_where_the_record_cannot_be_set_back_there_are_no_figures():
    process = Process(can_set_back=False)
    memory = process.parts()
    step(process, memory, rollout=900, train=8000)
    assert memory.report() == {} and memory.peak() == 8000
    untold = PartMemory(read=lambda: None, set_back=lambda: False)
    step(process, untold, rollout=900, train=8000)
    assert untold.report() == {} and untold.peak() is None


def test_on_an_accelerator_a_part_has_what_it_raised_the_peak_to(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    process = Process(can_set_back=False)
    memory = process.parts()
    process.use(500)  # the weights
    step(process, memory, rollout=400, scoring=450, train=700)
    assert memory.report() == {"memory/train": 700}
    step(process, memory, rollout=900, scoring=901, train=600)
    memory.restart()  # takes nothing away: it could not be had again
    step(process, memory, rollout=900, pause=2000, train=1500)
    assert memory.report() == {"memory/train": 700, "memory/rollout": 900, "memory/scoring": 901}
    assert memory.peak() == 2000


def test_the_record_is_left_alone_on_accelerators(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not set_peak_back()


@pytest.mark.skipif(not set_peak_back(), reason="the record of the peak cannot be set back here")
def test_memory_of_this_process():
    memory, size = PartMemory(), 160 * 2**20
    with memory.part("rollout"):
        del (x := [np.ones(size, np.uint8)])[0]
    assert not x
    with memory.part("scoring"):
        pass
    peaks = memory.report()
    above = peaks["memory/rollout"] - peaks["memory/scoring"]
    assert 0.9 * size < above < 1.5 * size
    assert memory.peak() >= peaks["memory/rollout"] > peaks["memory/train"]


def test_records_have_the_peaks_of_sections():
    rows, process = [], Process()

    class Lines:
        write = staticmethod(lambda step, metrics: rows.append(metrics))

    throughput = Throughput(memory=process.parts())
    record = Recorder(Lines(), ProgressBar(9, style="silent"), throughput, every_steps=2, num_steps=9)
    for number in range(1, 5):
        throughput.add_step(tokens=10)
        with throughput.section("rollout"):
            process.use(1000 if number == 1 else 200 + number)
        process.use(300 + number)
        record(number, None, {"loss": jnp.float32(1)})
        with throughput.paused():
            process.use(700)
    parts = [{name: value for name, value in row.items() if name.startswith("memory/")} for row in rows]
    assert parts == [
        {},
        {"memory/rollout": 202, "memory/train": 302},
        {"memory/rollout": 204, "memory/train": 304},
    ]
    assert [row["peak_memory_bytes"] for row in rows] == [1000, 1000, 1000]
