"""Bar plots as SVG for an HTML page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

# Distinct with red-green colour blindness as well.
_COLOURS = ("#3b76c4", "#d98a2b", "#3f9b6c", "#b0508f")
_LABEL, _BARS, _VALUE, _ROW, _GAP = 190, 560, 120, 20, 6  # pixels


@dataclass(frozen=True, slots=True)
class Bar:
    """A label, and a value of at least 0 for each series."""

    label: str
    values: Sequence[float]


def bar_plot(
    bars: Sequence[Bar], series: Sequence[str], *, unit: str = "", stacked: bool = True
) -> str:
    """Draw horizontal bars; returns "" without bars.

    Args:
        bars: from top to bottom.
        series: the names of the values, for the legend; at most four.
        unit: of the values.
        stacked: draw the values of a bar end to end; otherwise below each other.
    """
    if not bars:
        return ""
    assert len(series) <= len(_COLOURS)
    largest = max(sum(bar.values) if stacked else max(bar.values) for bar in bars) or 1.0
    legend = list(_legend(series)) if len(series) > 1 else []
    top = _ROW + _GAP if legend else 0
    shapes = [
        shape
        for number, bar in enumerate(bars)
        for shape in _bar(bar, top + number * (_ROW + _GAP), series, largest, unit, stacked)
    ]
    width, height = _LABEL + _BARS + _VALUE, top + len(bars) * (_ROW + _GAP)
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    content = "\n".join([*legend, *shapes])
    return f'<svg {size} font-size="12" role="img">\n{content}\n</svg>'


def _bar(
    bar: Bar, y: int, series: Sequence[str], largest: float, unit: str, stacked: bool
) -> Iterator[str]:
    yield f'<text x="{_LABEL - 8}" y="{y + 14}" text-anchor="end">{escape(bar.label)}</text>'
    thickness = _ROW if stacked else _ROW / len(series)
    begin, top = 0.0, float(y)
    for name, value, colour in zip(series, bar.values, _COLOURS, strict=False):
        label = escape(f"{bar.label}, {name}: {_number(value)} {unit}".strip())
        x, width = _LABEL + begin / largest * _BARS, value / largest * _BARS
        place = f'x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{thickness:.1f}"'
        yield f'<rect {place} fill="{colour}"><title>{label}</title></rect>'
        if stacked:
            begin += value
        else:
            top += thickness
    end = sum(bar.values) if stacked else max(bar.values)
    text = _number(end) if stacked else " → ".join(map(_number, bar.values))
    x = _LABEL + end / largest * _BARS + 6
    yield f'<text x="{x:.1f}" y="{y + 14}">{escape(f"{text} {unit}".strip())}</text>'


def _legend(series: Sequence[str]) -> Iterator[str]:
    x = _LABEL
    for name, colour in zip(series, _COLOURS, strict=False):
        yield f'<rect x="{x}" y="4" width="12" height="12" fill="{colour}"/>'
        yield f'<text x="{x + 17}" y="14">{escape(name)}</text>'
        x += 35 + 7 * len(name)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
