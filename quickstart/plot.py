"""A curve over the steps of a run: in braille dots for a terminal, and as PNG by matplotlib."""

from collections.abc import Sequence
from pathlib import Path

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of U+2800, by row and column within a character
_SMOOTHED = 9  # values that a smoothed one is the mean of


def check_matplotlib() -> None:
    """Raise ValueError where it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError('the plot needs matplotlib: pip install -e ".[quickstart]"') from None


def smooth(values: Sequence[float], width: int = _SMOOTHED) -> list[float]:
    """Means of up to `width` values around each."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw(steps: Sequence[int], values: Sequence[float], *, title: str, width: int = 60, height: int = 12) -> str:
    """A chart of values from 0 to 1 for a terminal, `width` by `height` characters inside its axes."""
    cells = [[0] * width for _ in range(height)]
    columns, rows = 2 * width, 4 * height
    first, last = steps[0], max(steps[-1], steps[0] + 1)
    for (x0, y0), (x1, y1) in zip(zip(steps, values), [*zip(steps, values)][1:] or [(steps[0], values[0])]):
        left, right = ((x - first) / (last - first) * (columns - 1) for x in (x0, x1))
        for column in range(round(left), round(right) + 1):
            share = (column - left) / (right - left) if right > left else 0.0
            level = min(max(y0 + min(max(share, 0), 1) * (y1 - y0), 0), 1)
            row = round((1 - level) * (rows - 1))
            cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
    lines = [title]
    for number, row in enumerate(cells):
        label = {0: "1.0", height // 2: "0.5", height - 1: "0.0"}.get(number, "")
        lines.append(f"{label:>4} ┤" + "".join(chr(0x2800 + cell) for cell in row).rstrip("\u2800"))
    lines.append("     └" + "─" * width)
    lines.append(f"      {first:<{width // 2}}{'step':<{width // 2 - len(str(last))}}{last}")
    return "\n".join(lines)


def save(path: Path, steps: Sequence[int], values: Sequence[float], *, marks: Sequence[tuple[int, float, str]]) -> None:
    """Write a PNG of a reward curve, with marked points (step, value, text)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, values, color="#a9c4e4", linewidth=1, label="reward of a step")
    axes.plot(steps, smooth(values), color="#1f4e8c", linewidth=2, label=f"mean of {_SMOOTHED} steps")
    for step, value, text in marks:
        axes.plot([step], [value], "o", color="#c0392b")
        axes.annotate(
            text, (step, value), xytext=(0, 8), textcoords="offset points", ha="left" if step < 2 else "right"
        )
    axes.set(xlabel="step of GRPO", ylabel="share of answers that are right", ylim=(0, 1.05))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path)
