"""The reward curve, in the terminal and as a picture."""

from pathlib import Path

import pytest

from quickstart.plot import draw, save, smooth


def heights(chart: str, width: int = 10, height: int = 4) -> list[int | None]:
    """The highest dot of each column of characters, counted in quarter lines from below; None for an empty one."""
    rows = [line[6:].ljust(width, "\u2800") for line in chart.splitlines()[1 : 1 + height]]
    found: list[int | None] = []
    for column in range(width):
        lit = [
            4 * (height - 1 - number) + 3 - dot
            for number, row in enumerate(rows)
            for dot, mask in enumerate((0x09, 0x12, 0x24, 0xC0))
            if (ord(row[column]) - 0x2800) & mask
        ]
        found.append(max(lit) if lit else None)
    return found


def test_a_rising_line_rises_from_corner_to_corner():
    chart = draw([1, 2, 3], [0.0, 0.5, 1.0], title="reward", width=10, height=4)
    levels = heights(chart)
    assert levels == sorted(levels) and levels[0] <= 1 and levels[-1] == 15
    assert chart.startswith("reward\n") and " 1.0 ┤" in chart and " 0.0 ┤" in chart


def test_a_flat_line_is_flat_at_its_height_whatever_the_steps():
    for steps in ([1, 2, 3, 4], [10, 20, 50, 400]):
        levels = heights(draw(steps, [1.0] * 4, title="", width=10, height=4))
        assert levels == [15] * 10


def test_values_outside_and_single_values_are_drawn_too():
    assert heights(draw([1, 2], [-3.0, -1.0], title="", width=10, height=4)) == [0] * 10
    assert heights(draw([1], [1.0], title="", width=10, height=4))[0] == 15


def test_smoothing_keeps_constants_and_takes_means_of_neighbours():
    assert smooth([0.5] * 20) == [0.5] * 20
    assert smooth([0.0, 3.0, 0.0, 0.0], width=3) == [1.5, 1.0, 1.0, 0.0]
    assert smooth([1.0]) == [1.0]


def test_the_picture_is_a_png(tmp_path: Path):
    pytest.importorskip("matplotlib")
    save(tmp_path / "reward.png", [1, 2, 3], [0.1, 0.2, 0.9], marks=[(1, 0.1, "before"), (3, 0.9, "after")])
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG\r\n")
