"""Plots, as PNG; without matplotlib there are none, and a sentence says so."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Draws on an axes.
Draw = Callable[[Any], None]


def save_figure(path: Path, title: str, *draws: Draw) -> Path | None:
    """Draw one plot beside another into a PNG; returns its path, or None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(
            'no plot: matplotlib is not installed, pip install "compiled-llm[bench]" brings it',
            file=sys.stderr,
        )
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
    """`y` over `x`, a line for each value of `by`; rows without `y` are left out."""

    def draw(axes: Any) -> None:
        for name in dict.fromkeys(row[by] for row in rows):
            points = [
                (row[x], row[y]) for row in rows if row[by] == name and row.get(y) is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, label=name)
        if log:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            ticks = sorted({row[x] for row in rows})
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                which("{x:.3g}")
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)

    return draw


def bars(rows: Sequence[dict[str, Any]], *, x: str, ys: Sequence[str], label: str) -> Draw:
    """A bar for each row, of the row's values one upon the other."""

    def draw(axes: Any) -> None:
        kept = [row for row in rows if any(row.get(y) is not None for y in ys)]
        bottoms = [0.0] * len(kept)
        for y in ys:
            heights = [row.get(y) or 0.0 for row in kept]
            axes.bar(range(len(kept)), heights, bottom=bottoms, label=y.replace("_", " "))
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        axes.set_xticks(
            range(len(kept)), [str(row[x]) for row in kept], rotation=25, ha="right", fontsize=8
        )
        axes.set_ylabel(label)
        if len(ys) > 1:
            axes.legend(fontsize=8)

    return draw


def timelines(rows: Sequence[dict[str, Any]]) -> Draw:
    """When the device works, a strip for each system; what is white is waiting."""

    def draw(axes: Any) -> None:
        for place, row in enumerate(rows):
            bars = [(begin, end - begin) for begin, end in row.get("timeline") or []]
            axes.broken_barh(bars, (place - 0.4, 0.8))
        axes.set_yticks(range(len(rows)), [row["system"] for row in rows])
        axes.set_xlabel("microseconds, under the profiler")

    return draw
