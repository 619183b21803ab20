"""A report as one HTML page of plots and tables that loads no other file."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from html import escape

from compiled_llm.report.report import BucketState, Report
from compiled_llm.report.svg import Bar, bar_plot
from compiled_llm.report.tables import ReportTable, report_tables, summary_lines

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --faint: #d8dade }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --paper: #17181a; --faint: #3c3f44 }
}
body { font: 14px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper) }
body { max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem }
svg { max-width: 100%; height: auto; fill: currentColor }
div { overflow-x: auto } table { border-collapse: collapse }
th, td { padding: .15rem .7rem; border-bottom: 1px solid var(--faint) }
th, td { text-align: left; vertical-align: top }
.number { text-align: right; font-variant-numeric: tabular-nums } .warning { font-weight: 600 }
"""


def render_html(report: Report, title: str = "compiled_llm report") -> str:
    """Return the page: the summary, the plots, the tables."""
    lines = [f"<p{_line_class(line)}>{escape(line)}</p>" for line in summary_lines(report)]
    plots = [f"<h2>{escape(name)}</h2>\n{plot}" for name, plot in _plots(report)]
    tables = [
        f"<h2>{escape(table.title)}</h2>\n<div>{_render_table(table)}</div>"
        for table in report_tables(report)
    ]
    viewport = '<meta name="viewport" content="width=device-width">'
    head = f'<meta charset="utf-8">{viewport}<title>{escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join([f"<h1>{escape(title)}</h1>", *lines, *plots, *tables])
    page = f'<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>'
    return f"<!doctype html>\n{page}\n"


def _plots(report: Report) -> Iterator[tuple[str, str]]:
    """Yield the headings and the plots of the data that there is."""
    phases = [Bar(phase.name, [phase.seconds]) for phase in report.phases if phase.seconds >= 0.005]
    yield "Time of the start-up", bar_plot(phases, ["seconds"], unit="s")
    spent = [
        Bar(b.bucket, [b.trace_seconds, b.compile_seconds, b.autotune_seconds, b.capture_seconds])
        for b in report.buckets
        if b.state is not BucketState.PENDING
    ]
    parts = ["trace", "compile or load", "autotune", "capture"]
    yield "Time of each bucket", bar_plot(spent, parts, unit="s")
    if any(bucket.bytes for bucket in report.buckets):
        memory = [
            Bar(bucket.bucket, [bucket.bytes / 2**20])
            for bucket in report.buckets
            if bucket.state is not BucketState.PENDING
        ]
        yield "Memory of each recording", bar_plot(memory, ["memory"], unit="MiB")
    tokens = [
        Bar(b.bucket, [b.replays * b.size - b.padded, b.padded])
        for b in report.buckets
        if b.replays
    ]
    yield "Tokens computed, and padding", bar_plot(tokens, ["tokens", "padding"])
    effects = bar_plot(_pass_effects(report), ["ops before", "ops after"], stacked=False)
    yield "Ops before and after each pass", effects


def _pass_effects(report: Report) -> list[Bar]:
    """Return the ops before and after each pass, summed over all buckets."""
    counts: dict[str, list[float]] = defaultdict(lambda: [0, 0])
    for graph_pass in (graph_pass for bucket in report.buckets for graph_pass in bucket.passes):
        counts[graph_pass.name][0] += graph_pass.ops_before
        counts[graph_pass.name][1] += graph_pass.ops_after
    return [Bar(name, values) for name, values in counts.items()]


def _render_table(table: ReportTable) -> str:
    rows = (_render_row(table, row, "td") for row in table.rows)
    return f"<table>{_render_row(table, table.columns, 'th')}{''.join(rows)}</table>"


def _render_row(table: ReportTable, cells: Sequence[str], tag: str) -> str:
    rendered = (
        f"<{tag}{_cell_class(table, column)}>{escape(cell)}</{tag}>"
        for column, cell in enumerate(cells)
    )
    return f"<tr>{''.join(rendered)}</tr>"


def _cell_class(table: ReportTable, column: int) -> str:
    return ' class="number"' if table.is_number(column) else ""


def _line_class(line: str) -> str:
    return ' class="warning"' if line.startswith("warning:") else ""
