"""Plots of a run, as PNG; without matplotlib a message replaces them."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Draws one plot on matplotlib axes.
Draw = Callable[[Any], None]


def save_figure(path: Path, title: str, *draws: Draw) -> Path | None:
    """Write plots side by side to a PNG file; return its path, or None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        install = 'pip install "compiled-llm[bench]"'
        print(f"no plot: matplotlib is not installed; install it with {install}", file=sys.stderr)
        return None
    figure = Figure(figsize=(6.4 * len(draws), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for draw, axes in zip(draws, figure.subplots(1, len(draws), squeeze=False)[0], strict=True):
        draw(axes)
    figure.savefig(path, dpi=130)
    return path


def lines(
    rows: Sequence[dict[str, Any]],
    *,
    x: str,
    y: str,
    by: str,
    labels: tuple[str, str],
    log: bool = True,
) -> Draw:
    """Return a plot of key `y` over key `x`, with a line for each value of key `by`.

    Args:
        rows: rows without a value for `y` are left out.
        labels: labels of the x and y axes.
        log: whether both axes are logarithmic.
    """

    def draw(axes: Any) -> None:
        for name in dict.fromkeys(row[by] for row in rows):
            points = [
                (row[x], row[y]) for row in rows if row[by] == name and row.get(y) is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, label=name)
        if log:
            _log_axes(axes, sorted({row[x] for row in rows}))
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)

    return draw


def bars(rows: Sequence[dict[str, Any]], *, x: str, ys: Sequence[str], label: str) -> Draw:
    """Return a plot with a bar for each row, which stacks the values of the keys `ys`."""

    def draw(axes: Any) -> None:
        drawn = [row for row in rows if any(row.get(y) is not None for y in ys)]
        bottoms = [0.0] * len(drawn)
        for y in ys:
            heights = [row.get(y) or 0.0 for row in drawn]
            axes.bar(range(len(drawn)), heights, bottom=bottoms, label=y.replace("_", " "))
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        names = [str(row[x]) for row in drawn]
        axes.set_xticks(range(len(drawn)), names, rotation=25, ha="right", fontsize=8)
        axes.set_ylabel(label)
        if len(ys) > 1:
            axes.legend(fontsize=8)

    return draw


def timelines(rows: Sequence[dict[str, Any]]) -> Draw:
    """Return a plot of when the device is busy, with a strip for each system."""

    def draw(axes: Any) -> None:
        for place, row in enumerate(rows):
            spans = [(begin, end - begin) for begin, end in row.get("timeline") or []]
            axes.broken_barh(spans, (place - 0.4, 0.8))
        axes.set_yticks(range(len(rows)), [row["system"] for row in rows])
        axes.set_xlabel("microseconds, under the profiler")

    return draw


def _log_axes(axes: Any, ticks: Sequence[Any]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
