"""Charts of the documentation, drawn from the records in bench/results: `python -m bench.charts`.

Each chart is an SVG in docs/images, in two variants: `NAME-light.svg` and `NAME-dark.svg`. The
figures come from the newest record of each model that timed both systems at several batch sizes.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.record import RESULTS, roofline_of
from bench.worker_client import ROOT

IMAGES = ROOT / "docs" / "images"

_SYSTEMS = {"ours": "compiled_llm", "vllm": "vLLM"}
_BAR = 0.4  # width, of the distance between two batch sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One chart: a file name and the value of a record's row that its bars show.

    Attributes:
        name: stem of the files.
        value: key of a row, in milliseconds.
        labels: labels of the x and y axes.
        log: whether the y axis is logarithmic; it then begins at 1 ms.
    """

    name: str
    value: str
    labels: tuple[str, str]
    log: bool = False


CHARTS = (
    Chart(
        name="decode-latency",
        value="step_ms",
        labels=("batch size", "decode step, ms"),
    ),
    Chart(
        name="first-token",
        value="first_token_ms",
        labels=("prompts submitted at once", "time to all first tokens, ms (log)"),
        log=True,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """Colours of one variant; the background is transparent."""

    name: str
    text: str
    grid: str
    bars: Mapping[str, str]


THEMES = (
    Theme(
        name="light",
        text="#24292f",
        grid="#d0d7de",
        bars={"ours": "#1f6feb", "vllm": "#9aa4af"},
    ),
    Theme(
        name="dark",
        text="#d8dee4",
        grid="#3d444d",
        bars={"ours": "#58a6ff", "vllm": "#7d8590"},
    ),
)


def newest_comparisons(results: Path) -> list[dict[str, Any]]:
    """Return the newest latency record of each model that compares both systems by batch size.

    Records that failed for a system, or that hold a single batch size, are left out. The order is
    that of the models' weights, small to large.
    """
    newest: dict[str, dict[str, Any]] = {}
    for record in _records(results, "latency"):
        systems = {row["system"] for row in record["rows"] if row["failure"] is None}
        if systems >= set(_SYSTEMS) and len(_batches(record)) > 1:
            name = model_name(record)
            if name not in newest or record["date"] > newest[name]["date"]:
                newest[name] = record
    return sorted(newest.values(), key=lambda record: roofline_of(record)["weight_bytes"])


def model_name(record: Mapping[str, Any]) -> str:
    """Return the display name of a record's model, such as Qwen3-0.6B."""
    name = Path(record["config"]["model"]["name"] or "SmolLM2-135M-Instruct")
    return name.name.removesuffix(".json").title()


def draw(chart: Chart, records: Sequence[Mapping[str, Any]], images: Path) -> list[Path]:
    """Draw both variants of a chart, a panel for each record; return their paths."""
    images.mkdir(parents=True, exist_ok=True)
    return [_draw_variant(chart, records, theme, images) for theme in THEMES]


def main(results: Path = RESULTS, images: Path = IMAGES) -> int:
    """Draw all charts; return the exit status."""
    records = newest_comparisons(results)
    if not records:
        expected = "expected a latency record with the systems ours and vllm at several batch sizes"
        print(f"no chart was drawn: {expected} in {results}", file=sys.stderr)
        return 2
    for path in (path for chart in CHARTS for path in draw(chart, records, images)):
        print(path)
    return 0


def _records(results: Path, command: str) -> Iterator[dict[str, Any]]:
    for path in sorted(results.glob(f"*-{command}-*.json")):
        yield json.loads(path.read_text())


def _batches(record: Mapping[str, Any]) -> list[int]:
    return sorted({row["batch"] for row in record["rows"]})


def _draw_variant(
    chart: Chart,
    records: Sequence[Mapping[str, Any]],
    theme: Theme,
    images: Path,
) -> Path:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    path = images / f"{chart.name}-{theme.name}.svg"
    with _style(theme):
        figure = Figure(figsize=(4.4 * len(records), 3.3), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(1, len(records), squeeze=False)[0]
        for axes, record in zip(panels, records, strict=True):
            _draw_panel(axes, chart, record, theme)
        panels[0].set_ylabel(chart.labels[1])
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
        captions = dict.fromkeys(_caption(record) for record in records)
        figure.supxlabel("; ".join(captions), fontsize=7.5)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    return path


def _draw_panel(axes: Any, chart: Chart, record: Mapping[str, Any], theme: Theme) -> None:
    batches = _batches(record)
    for number, (system, label) in enumerate(_SYSTEMS.items()):
        values = _values(record["rows"], system, chart.value)
        left = [batches.index(batch) + _BAR * (number - 0.5) for batch in values]
        heights = list(values.values())
        bars = axes.bar(left, heights, 0.94 * _BAR, color=theme.bars[system], label=label)
        axes.bar_label(bars, list(map(_three_digits, heights)), fontsize=7.5, padding=2)
    axes.set_title(model_name(record))
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlabel(chart.labels[0])
    if chart.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.locator_params(axis="y", nbins=4)
    axes.margins(y=0.1)
    axes.set_ylim(bottom=1 if chart.log else 0)
    axes.grid(axis="y", color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, which="both")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _values(rows: Iterable[Mapping[str, Any]], system: str, key: str) -> dict[int, float]:
    """Return the values of one system by batch size, failed batches left out."""
    values = {row["batch"]: row.get(key) for row in rows if row["system"] == system}
    return {batch: value for batch, value in values.items() if value is not None}


def _three_digits(value: float) -> str:
    """Format a value with three significant digits, trailing zeros included."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _caption(record: Mapping[str, Any]) -> str:
    roofline = roofline_of(record)
    arguments, versions = record["arguments"], record["versions"]
    return ", ".join(
        (
            roofline["device_name"],
            roofline["dtype"],
            f"prompts of {arguments['context']} tokens",
            f"torch {versions['torch']}",
            f"vLLM {record['systems']['vllm']['version']}",
            record["date"][:10],
        )
    )


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    import matplotlib

    texts = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor")
    options: Any = dict.fromkeys(texts, theme.text)
    # With a fixed salt the SVG's ids are the same in each run, so unchanged charts do not differ.
    options |= {"axes.edgecolor": theme.grid, "font.size": 9, "svg.hashsalt": "compiled_llm"}
    with matplotlib.rc_context(options):
        yield


if __name__ == "__main__":
    raise SystemExit(main())
