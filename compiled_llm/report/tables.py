"""A report as tables of text."""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compiled_llm.report.report import BucketReport, BucketState, Report, Verification
from passes import PassReport

_TEXT_COLUMNS = {"state", "made by", "failure", "bucket", "outcome"}
_SECONDS = ["trace s", "compile s", "tune s", "capture s"]
_BUCKET = ["bucket", "state", "made by", *_SECONDS, "MiB", "replays", "padded tokens", "failure"]
_PASS = ["pass", "bucket", "matches", "expected", "seconds", "ops before", "ops after"]
_VERIFIED = [
    *("bucket", "rows", "top-1", "logit difference", "choice gap", "KV difference"),
    *("in std", "allowed", "outcome"),
]


@dataclass(frozen=True, slots=True)
class ReportTable:
    """A table of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def is_number(self, column: int) -> bool:
        """Return whether a column holds numbers."""
        return column > 0 and self.columns[column] not in _TEXT_COLUMNS


def render_report(report: Report) -> str:
    """Return the whole report for a terminal."""
    return render_text([*summary_lines(report), *report_tables(report)])


def render_verification(report: Report) -> str:
    """Return the verified buckets as a table, followed by those that could not be compiled."""
    reasons = [
        f"{bucket.bucket} could not be verified: {bucket.failure}"
        for bucket in report.buckets
        if bucket.verification is None and bucket.failure is not None
    ]
    return render_text([_verification_table(report.buckets), *reasons])


def render_text(parts: Iterable[ReportTable | str]) -> str:
    """Format tables and lines for a terminal of 140 columns."""
    console = Console(file=io.StringIO(), width=140)
    for part in parts:
        if isinstance(part, ReportTable):
            console.print(_rich_table(part))
        else:
            console.print(part, highlight=False, markup=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def summary_lines(report: Report) -> list[str]:
    """Return the facts, the warnings and the totals, a line each."""
    pool = _mib(report.counters.pool_bytes)
    return [
        *(f"{name}: {value}" for name, value in report.facts.items()),
        *(f"warning: {warning}" for warning in report.warnings),
        f"CUDA graphs: {report.counters.graphs}, in a pool of {pool} MiB",
        f"padding: {report.padding_waste:.1%} of the tokens computed in buckets",
    ]


def report_tables(report: Report) -> Iterator[ReportTable]:
    """Yield the tables of a report."""
    buckets, counters = report.buckets, report.counters
    phases = [(phase.name, f"{phase.seconds:.2f}", _mib(phase.bytes)) for phase in report.phases]
    yield ReportTable("phases", ["phase", "seconds", "MiB"], phases)
    yield ReportTable("buckets", _BUCKET, [_bucket_row(bucket) for bucket in buckets])
    passes = [_pass_row(bucket.bucket, each) for bucket in buckets for each in bucket.passes]
    yield ReportTable("passes", _PASS, passes)
    if any(bucket.verification for bucket in buckets):
        yield _verification_table(buckets)
    fallbacks = _counts(counters.fallbacks) or [("none", "0")]
    yield ReportTable("eager fallbacks", ["reason", "steps"], fallbacks)
    if counters.stand_ins:
        yield ReportTable("other buckets", ["reason", "steps"], _counts(counters.stand_ins))
    scheduling = [
        (name.replace("_", " "), f"{value:.6g}")
        for name, value in asdict(report.scheduling).items()
    ]
    yield ReportTable("scheduling", ["what", "count"], scheduling)
    yield ReportTable("graph events", ["event", "count"], _counts(counters.graph_events))


def _counts(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    return [(name, str(count)) for name, count in counts.items()]


def _bucket_row(bucket: BucketReport) -> list[str]:
    seconds = [
        f"{part:.2f}"
        for part in (
            bucket.trace_seconds,
            bucket.compile_seconds,
            bucket.autotune_seconds,
            bucket.capture_seconds,
        )
    ]
    counts = [_mib(bucket.bytes), str(bucket.replays), str(bucket.padded)]
    return [
        bucket.bucket, bucket.state, _made_by(bucket), *seconds, *counts, bucket.failure or ""
    ]  # fmt: skip


def _made_by(bucket: BucketReport) -> str:
    if bucket.loaded:
        return "artifact"
    return "" if bucket.state in (BucketState.PENDING, BucketState.LEFT_OUT) else "compiling"


def _verification_table(buckets: Iterable[BucketReport]) -> ReportTable:
    rows = [
        _verified_row(bucket.bucket, bucket.verification)
        for bucket in buckets
        if bucket.verification is not None
    ]
    return ReportTable("verification", _VERIFIED, rows)


def _verified_row(bucket: str, found: Verification) -> list[str]:
    logits = "not stored" if found.logit_difference is None else f"{found.logit_difference:.2g}"
    errors = (found.choice_gap, found.cache_difference, found.error, found.allowed)
    return [
        bucket,
        str(found.rows),
        f"{found.agreement:.1%}",
        logits,
        *(f"{value:.2g}" for value in errors),
        found.failure or "equal",
    ]


def _pass_row(bucket: str, report: PassReport) -> list[str]:
    return [
        report.name,
        bucket,
        str(report.matches),
        str(report.expected),
        f"{report.seconds:.3f}",
        str(report.ops_before),
        str(report.ops_after),
    ]


def _rich_table(source: ReportTable) -> Table:
    table = Table(title=source.title, title_justify="left")
    for number, column in enumerate(source.columns):
        table.add_column(column, justify="right" if source.is_number(number) else "left")
    for row in source.rows:
        table.add_row(*map(Text, row))
    return table


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f}"
