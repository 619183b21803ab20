"""A report as one HTML page: plots first, then the tables. It needs nothing else, not even a network."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from html import escape

from compiled_llm.report.report import BucketState, Report
from compiled_llm.report.svg import Bar, bar_plot
from compiled_llm.report.tables import ReportTable

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --faint: #d8dade }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e9; --paper: #17181a; --faint: #3c3f44 } }
body { font: 14px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper) }
body { max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem } svg { max-width: 100%; height: auto; fill: currentColor }
div { overflow-x: auto } table { border-collapse: collapse }
th, td { padding: .15rem .7rem; border-bottom: 1px solid var(--faint); text-align: left; vertical-align: top }
.number { text-align: right; font-variant-numeric: tabular-nums } .warning { font-weight: 600 }
"""


def render_html(report: Report, title: str = "compiled_llm report") -> str:
    """The whole page."""
    lines = [f"<p{_warns(line)}>{escape(line)}</p>" for line in report.summary_lines()]
    plots = [f"<h2>{escape(name)}</h2>\n{plot}" for name, plot in _plots(report)]
    tables = [
        f"<h2>{escape(table.title)}</h2>\n<div>{_render_table(table)}</div>"
        for table in report.tables()
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join([f"<h1>{escape(title)}</h1>", *lines, *plots, *tables])
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'


def _plots(report: Report) -> Iterator[tuple[str, str]]:
    """Headings and plots, of what there is to show."""
    phases = [Bar(phase.name, [phase.seconds]) for phase in report.phases if phase.seconds >= 0.005]
    yield "Where the start went", bar_plot(phases, ["seconds"], unit="s")
    buckets = [b for b in report.buckets if b.state is not BucketState.PENDING]
    spent = [
        Bar(b.bucket, [b.trace_seconds, b.compile_seconds, b.autotune_seconds, b.capture_seconds])
        for b in buckets
    ]
    yield (
        "What each bucket cost",
        bar_plot(spent, ["trace", "compile or load", "autotune", "capture"], unit="s"),
    )
    if any(bucket.bytes for bucket in buckets):
        memory = [Bar(bucket.bucket, [bucket.bytes / 2**20]) for bucket in buckets]
        yield "Memory of each recording", bar_plot(memory, ["memory"], unit="MiB")
    served = [
        Bar(b.bucket, [b.replays * b.size - b.padded, b.padded]) for b in buckets if b.replays
    ]
    yield "Tokens computed, and how many were padding", bar_plot(served, ["tokens", "padding"])
    yield (
        "What each pass made of the graphs",
        bar_plot(_pass_effects(report), ["ops before", "ops after"], stacked=False),
    )


def _pass_effects(report: Report) -> list[Bar]:
    """Ops before and after each pass, over all buckets."""
    counts: dict[str, list[float]] = defaultdict(lambda: [0, 0])
    for graph_pass in (graph_pass for bucket in report.buckets for graph_pass in bucket.passes):
        counts[graph_pass.name][0] += graph_pass.ops_before
        counts[graph_pass.name][1] += graph_pass.ops_after
    return [Bar(name, values) for name, values in counts.items()]


def _render_table(table: ReportTable) -> str:
    return f"<table>{_render_row(table, table.columns, 'th')}{''.join(_render_row(table, row, 'td') for row in table.rows)}</table>"


def _render_row(table: ReportTable, cells: Sequence[str], tag: str) -> str:
    marks = (
        "" if not table.is_number(column) else ' class="number"' for column in range(len(cells))
    )
    return f"<tr>{''.join(f'<{tag}{mark}>{escape(cell)}</{tag}>' for cell, mark in zip(cells, marks, strict=True))}</tr>"


def _warns(line: str) -> str:
    return ' class="warning"' if line.startswith("warning:") else ""
