"""Bar plots as SVG, to stand in an HTML page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

_COLOURS = (
    "#3b76c4",
    "#d98a2b",
    "#3f9b6c",
    "#b0508f",
)  # told apart also by those who do not tell red from green
_LABEL, _BARS, _VALUE, _ROW, _GAP = 190, 560, 120, 20, 6  # pixels


@dataclass(frozen=True, slots=True)
class Bar:
    """A label, and a value, 0 or more, for each series."""

    label: str
    values: Sequence[float]


def bar_plot(
    bars: Sequence[Bar], series: Sequence[str], *, unit: str = "", stacked: bool = True
) -> str:
    """Horizontal bars, one below the other, the values of each end to end (or, not stacked, below each other); "" without bars.

    Args:
        bars: from the top.
        series: what the values are, for the legend, up to four.
        unit: of the values.
        stacked: whether values add up.
    """
    if not bars:
        return ""
    assert len(series) <= len(_COLOURS)
    largest = max(sum(bar.values) if stacked else max(bar.values) for bar in bars) or 1.0
    legend = list(_legend(series)) if len(series) > 1 else []
    top = _ROW + _GAP if legend else 0
    places = range(top, top + len(bars) * (_ROW + _GAP), _ROW + _GAP)
    shapes = [
        shape
        for y, bar in zip(places, bars, strict=True)
        for shape in _bar(bar, y, series, largest, unit, stacked)
    ]
    width, height = _LABEL + _BARS + _VALUE, top + len(bars) * (_ROW + _GAP)
    inside = "\n".join([*legend, *shapes])
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-size="12" role="img">\n{inside}\n</svg>'


def _bar(
    bar: Bar, y: int, series: Sequence[str], largest: float, unit: str, stacked: bool
) -> Iterator[str]:
    yield f'<text x="{_LABEL - 8}" y="{y + 14}" text-anchor="end">{escape(bar.label)}</text>'
    thickness = _ROW if stacked else _ROW / len(series)
    begin, place = 0.0, float(y)
    for name, value, colour in zip(series, bar.values, _COLOURS, strict=False):
        hint = f"<title>{escape(f'{bar.label}, {name}: {_number(value)} {unit}'.strip())}</title>"
        x, width = _LABEL + begin / largest * _BARS, value / largest * _BARS
        yield f'<rect x="{x:.1f}" y="{place:.1f}" width="{width:.1f}" height="{thickness:.1f}" fill="{colour}">{hint}</rect>'
        begin, place = (begin + value, place) if stacked else (0.0, place + thickness)
    end = sum(bar.values) if stacked else max(bar.values)
    text = _number(end) if stacked else " → ".join(map(_number, bar.values))
    yield f'<text x="{_LABEL + end / largest * _BARS + 6:.1f}" y="{y + 14}">{escape(f"{text} {unit}".strip())}</text>'


def _legend(series: Sequence[str]) -> Iterator[str]:
    x = _LABEL
    for name, colour in zip(series, _COLOURS, strict=False):
        yield f'<rect x="{x}" y="4" width="12" height="12" fill="{colour}"/><text x="{x + 17}" y="14">{escape(name)}</text>'
        x += 35 + 7 * len(name)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
