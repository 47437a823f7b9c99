"""The most memory that each part of a step takes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from trainers.flops import peak_memory_bytes

_REST = "train"


def set_peak_back() -> bool:
    """Make `peak_memory_bytes` begin anew at what is in use now; False where that cannot be: Linux alone has a way, and
    for the resident memory of processes on a CPU alone. Source: proc_pid_clear_refs(5)."""
    if jax.default_backend() != "cpu":
        return False
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


class PartMemory:
    """Peaks of memory, bytes, by the part of a step: what is between the parts is "train".

    On a CPU a figure is the most that was resident in the process while its part ran, whatever put it there: arrays of
    other parts that live on, and freed memory that the allocator has kept. Linux's record of the peak is set back
    between the parts; where that is not allowed there are no figures.

    On accelerators it is `peak_memory_bytes`, of the fullest device since the process began, which cannot be set back.
    A part has a figure once it has raised that peak: what it has raised it to. So the highest figure is its part's
    peak; another is a lower bound; a part without one, and any part later on, has stayed below the highest peak so far,
    of which the start of the run is a part. Times are those of the host: a part has to wait for what it began.
    """

    def __init__(
        self,
        *,
        read: Callable[[], int | None] = peak_memory_bytes,
        set_back: Callable[[], bool] = set_peak_back,
    ):
        self._read, self._set_back = read, set_back
        self._part: str | None = None
        self._began = False
        self._anew = False  # whether the record was set back when the part began
        self._before = self._highest = 0
        self._peaks: dict[str, int] = {}

    @contextmanager
    def part(self, name: str | None) -> Iterator[None]:
        """What runs inside is the part of that name; None is no part. Not inside another. Nothing counts before the
        first part that has a name."""
        self._began = self._began or name is not None
        if not self._began:
            yield
            return
        self._turn_to(name)
        try:
            yield
        finally:
            self._turn_to(_REST)

    def report(self) -> dict[str, int]:
        """memory/NAME of each part with a figure: on a CPU since `restart`, on accelerators since the run began."""
        if self._began:
            self._turn_to(_REST)
        return {f"memory/{name}": peak for name, peak in self._peaks.items()}

    def restart(self) -> None:
        """Forget the figures that can be had anew."""
        if self._began:
            self._turn_to(_REST)
        if self._anew:
            self._peaks = {}

    def peak(self) -> int | None:
        """What `peak_memory_bytes` would be if nothing had set it back."""
        now = self._read()
        return None if now is None else max(now, self._highest)

    def _turn_to(self, name: str | None) -> None:
        """Note what the part until now has reached; what follows is another's."""
        peak = self._read()
        if peak is None:
            return
        self._highest = max(self._highest, peak)
        attributable = self._anew or (jax.default_backend() != "cpu" and peak > self._before)
        if self._part is not None and attributable:
            self._peaks[self._part] = max(self._peaks.get(self._part, 0), peak)
        self._part, self._before, self._anew = name, peak, self._set_back()
