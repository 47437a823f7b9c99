"""What the clock says about training: tokens per second, time waited for data, and model FLOPs utilisation."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter

from trainers.memory import PartMemory


class Throughput:
    """Adds up the steps since the last report, and turns them into rates.

    The seconds of a report are those on the clock between it and the report before, without pauses. Jax runs behind
    Python, so a report is true where the caller has just converted a value of the last step, as one does to write it
    down. Nothing here waits for a device: tokens and FLOPs are numbers known on the host.
    """

    def __init__(
        self,
        *,
        peak_flops: float | None = None,
        memory: PartMemory | None = None,
        clock: Callable[[], float] = perf_counter,
    ):
        """`peak_flops` is the FLOP/s of all devices that share the work together; None leaves utilisation out.

        `memory` is told of the sections and pauses, so that it has the peak of each; without it none is reported.
        """
        if peak_flops is not None and not peak_flops > 0:
            raise ValueError(f"peak_flops must be positive, not {peak_flops}")
        self.memory = memory
        self._peak_flops = peak_flops
        self._clock = clock
        self.restart()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """What runs inside is a part of the step, to be told apart from the rest of it. Not inside another."""
        start = self._clock()
        try:
            with self._part(name):
                yield
        finally:
            self._sections[name] = self._sections.get(name, 0.0) + self._clock() - start

    def restart(self) -> None:
        """Forget the steps so far: what follows is measured from now on. Leaves out, say, a step that compiles."""
        self._start = self._clock()
        self._waited = self._paused = 0.0
        self._steps = self._tokens = 0
        self._flops: float | None = 0
        self._sections: dict[str, float] = {}
        if self.memory is not None:
            self.memory.restart()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What runs inside is waiting for data."""
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside, such as evaluation, is no training and its time is not counted. Not inside `waiting`."""
        start = self._clock()
        try:
            with self._part(None):
                yield
        finally:
            self._paused += self._clock() - start

    def add_step(self, *, tokens: int, flops: float | None = None) -> None:
        """Count a step over so many tokens, padding left out, and so many model FLOPs, both of all devices together."""
        self._steps += 1
        self._tokens += tokens
        self._flops = None if flops is None or self._flops is None else self._flops + flops

    def report(self) -> dict[str, float]:
        """Rates since the last report, and a new beginning; empty where there was no step or no time.

        tokens_per_second; step_seconds, the mean; data_wait, the fraction of the time; mfu, the fraction of the peak,
        where the FLOPs of every step and the peak are known. Where steps have sections, time/NAME are the seconds a
        step of each, and time/train those of the rest; memory/NAME are bytes, see `PartMemory`.
        """
        seconds = self._clock() - self._start - self._paused
        steps, tokens, flops, waited = self._steps, self._tokens, self._flops, self._waited
        sections, memory = self._sections, {} if self.memory is None else self.memory.report()
        self.restart()
        if not steps or seconds <= 0:
            return {}
        rates = {"tokens_per_second": tokens / seconds, "step_seconds": seconds / steps, "data_wait": waited / seconds}
        if sections:
            rest = seconds - waited - sum(sections.values())
            rates |= {f"time/{name}": own / steps for name, own in (sections | {"train": rest}).items()}
        if flops is not None and self._peak_flops is not None:
            rates["mfu"] = flops / seconds / self._peak_flops
        return rates | memory

    def _part(self, name: str | None) -> AbstractContextManager:
        return nullcontext() if self.memory is None else self.memory.part(name)
