"""Rates by a clock that the tests turn."""

import pytest

from trainers.metrics import Throughput


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now

    def turn(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def test_rates_are_of_all_steps_since_the_last_report(clock):
    timer = Throughput(peak_flops=1000.0, clock=clock)
    for tokens, seconds, wait, flops in ((100, 3.0, 1.0, 1200), (60, 4.0, 0.0, 800)):
        with timer.waiting():
            clock.turn(wait)
        clock.turn(seconds)
        timer.add_step(tokens=tokens, flops=flops)
    assert timer.report() == {"tokens_per_second": 20.0, "step_seconds": 4.0, "data_wait": 0.125, "mfu": 0.25}
    clock.turn(2.0)
    timer.add_step(tokens=10, flops=100)
    assert timer.report() == {"tokens_per_second": 5.0, "step_seconds": 2.0, "data_wait": 0.0, "mfu": 0.05}


def test_sections_are_parts_of_a_step_and_the_rest_is_training(clock):
    timer = Throughput(clock=clock)
    for _ in range(2):
        with timer.waiting():
            clock.turn(1.0)
        with timer.section("rollout"):
            clock.turn(4.0)
        with pytest.raises(KeyError), timer.section("rewards"):
            clock.turn(0.5)
            raise KeyError
        with timer.section("rollout"):
            clock.turn(1.0)
        clock.turn(2.0)
        with timer.paused():
            clock.turn(30.0)
        timer.add_step(tokens=17)
    assert timer.report() == {
        "tokens_per_second": 2.0,
        "step_seconds": 8.5,
        "data_wait": 2 / 17,
        "time/rollout": 5.0,
        "time/rewards": 0.5,
        "time/train": 2.0,
    }
    clock.turn(1.0)
    timer.add_step(tokens=1)
    assert not any(name.startswith("time/") for name in timer.report())  # of steps without


def test_pauses_are_not_counted(clock):
    timer = Throughput(clock=clock)
    clock.turn(2.0)
    with timer.paused():
        clock.turn(50.0)
    timer.add_step(tokens=8)
    assert timer.report()["tokens_per_second"] == 4.0
    clock.turn(2.0)
    timer.add_step(tokens=8)
    assert timer.report()["step_seconds"] == 2.0  # and the pause does not go on


def test_time_counts_although_what_it_is_spent_in_fails(clock):
    timer = Throughput(clock=clock)
    with pytest.raises(StopIteration), timer.waiting():
        clock.turn(1.0)
        next(iter([]))
    clock.turn(3.0)
    timer.add_step(tokens=1)
    assert timer.report()["data_wait"] == 0.25


def test_restarting_leaves_out_what_was(clock):
    timer = Throughput(clock=clock)
    with timer.waiting():
        clock.turn(60.0)
    timer.add_step(tokens=1000)
    timer.restart()
    clock.turn(2.0)
    timer.add_step(tokens=6)
    assert timer.report() == {"tokens_per_second": 3.0, "step_seconds": 2.0, "data_wait": 0.0}


def test_without_steps_or_time_there_is_no_rate(clock):
    timer = Throughput(clock=clock)
    clock.turn(1.0)
    assert timer.report() == {}
    timer.add_step(tokens=1)
    assert timer.report() == {}


@pytest.mark.parametrize(
    ("peak", "flops"), [(None, (5, 5)), (10.0, (None, None)), (10.0, (5, None)), (10.0, (None, 5))]
)
def test_utilisation_is_left_out_rather_than_guessed(clock, peak, flops):
    timer = Throughput(peak_flops=peak, clock=clock)
    for one in flops:
        clock.turn(1.0)
        timer.add_step(tokens=1, flops=one)
    assert "mfu" not in timer.report()
    clock.turn(1.0)
    timer.add_step(tokens=1, flops=5)
    assert ("mfu" in timer.report()) == (peak is not None)  # known again


@pytest.mark.parametrize("peak", [0, -1.0, float("nan")])
def test_a_senseless_peak_is_refused(peak):
    with pytest.raises(ValueError, match="peak_flops"):
        Throughput(peak_flops=peak)
