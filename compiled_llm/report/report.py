"""What an engine did and what it cost: phases, buckets, passes, fallbacks."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import torch

from compiled_llm.report.tables import ReportTable, render_text
from compiled_llm.system.device_memory import used_bytes
from passes import PassReport


@dataclass(slots=True, kw_only=True)
class PhaseReport:
    """One phase of the start: wall time, and how much more memory was in use at its end (see `used_bytes`); 0 for a part of one."""

    name: str
    seconds: float
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """A bucket against the same steps uncompiled, on random batches.

    Attributes:
        batches, rows: tried; the rows of all batches together.
        agreement: the share of rows for which both chose the same token (top-1, where a row is greedy).
        logit_difference: the largest; None where the bucket's step keeps no logits and so shows its choices alone.
        choice_gap: how far a token that the bucket chose lay below the one that it should have, at most; half of it is the
            least that the logits must have differed by.
        cache_difference: the largest among the keys and values written.
        error, allowed: the largest of these differences (of the gap, half), in standard deviations of what was compared.
        failure: why the bucket is not used, or None.
    """

    batches: int
    rows: int
    agreement: float
    logit_difference: float | None
    choice_gap: float
    cache_difference: float
    error: float
    allowed: float
    failure: str | None


class BucketState(StrEnum):
    """State of a bucket. `BucketReport.failure` gives the reason for the last three."""

    GRAPH = "graph"  # a step replays its CUDA graph
    COMPILED = "compiled"  # a step calls its compiled function
    PENDING = "pending"  # compiled when a step first needs it (compile.capture: lazy)
    LEFT_OUT = "left out"  # memory.graphs has no space for its CUDA graph
    FAILED = "failed"  # compilation, capture or verification failed


@dataclass(slots=True, kw_only=True)
class BucketReport:
    """One bucket.

    Attributes:
        size: tokens of a step.
        state: see `BucketState`.
        saved: whether an artifact has it now; save_failure: why it could not be kept there, if it could not.
        loaded: whether it had it before; `compile_seconds` is then what loading took.
        trace_seconds, compile_seconds, autotune_seconds, capture_seconds: one after another; capture is two warm calls.
        bytes: device memory that its recording took: what the pool grew by, and what the driver holds for the graph.
        replays, padded: steps served by its compiled code, and the tokens of these steps that were padding.
        failure: why it is not used, if it is not.
        verification: what `verify` found.
        passes: reports of its graph passes, when they ran; empty when Inductor's cache served the graph.
    """

    bucket: str
    size: int
    state: BucketState = BucketState.FAILED
    loaded: bool = False
    saved: bool = False
    save_failure: str | None = None
    trace_seconds: float = 0.0
    compile_seconds: float = 0.0
    autotune_seconds: float = 0.0
    capture_seconds: float = 0.0
    bytes: int = 0
    replays: int = 0
    padded: int = 0
    failure: str | None = None
    verification: Verification | None = None
    passes: list[PassReport] = field(default_factory=list)


@dataclass(slots=True)
class SchedulingReport:
    """What the engine's scheduler did.

    Attributes:
        steps, decode_steps: launched; those that only decoded.
        tokens: computed, prompts and outputs.
        cached_tokens: prompt tokens that were found in shared pages instead.
        preemptions: times that a request made room and was computed again.
        processor_calls: tokens chosen outside the graph, by requests' own logits processors.
        recoveries: calls that an exception cut short, after which running requests ended with an error.
        host_seconds, wait_seconds: of the thread that steps: its own work, and waiting for the device.
    """

    steps: int = 0
    decode_steps: int = 0
    tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    processor_calls: int = 0
    recoveries: int = 0
    host_seconds: float = 0.0
    wait_seconds: float = 0.0


@dataclass(slots=True)
class Report:
    """Everything an engine counts. Prints as tables; `to_dict()` is plain data.

    Attributes:
        facts: what was built, in words and numbers.
        warnings: what the start did otherwise than it was told, and why.
        artifact_refusal: why an artifact was not used, the named one's reason first; None where none was refused.
        graphs, pool_bytes: CUDA graphs recorded, and the memory pool that they share.
        fallbacks: steps that ran eagerly, by reason.
        stand_ins: steps that ran in a larger or dearer bucket than the one that fits, by reason.
        graph_events: graph skips, recompiles and re-records during steps; all zero in a healthy engine. A direct replay can
            cause none, so it is not counted.
    """

    facts: dict[str, str | int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    artifact_refusal: str | None = None
    phases: list[PhaseReport] = field(default_factory=list)
    buckets: list[BucketReport] = field(default_factory=list)
    graphs: int = 0
    pool_bytes: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    stand_ins: Counter[str] = field(default_factory=Counter)
    graph_events: dict[str, int] = field(default_factory=dict)
    scheduling: SchedulingReport = field(default_factory=SchedulingReport)

    @property
    def padding_waste(self) -> float:
        """The share of padding in all tokens that the buckets' steps computed."""
        padded = sum(bucket.padded for bucket in self.buckets)
        return padded / max(1, sum(bucket.replays * bucket.size for bucket in self.buckets))

    @contextmanager
    def phase(self, name: str, device: torch.device) -> Iterator[None]:
        """Time a phase of the start and measure the memory it takes."""
        begin, used = time.perf_counter(), used_bytes(device)
        yield
        self.phases.append(
            PhaseReport(
                name=name, seconds=time.perf_counter() - begin, bytes=used_bytes(device) - used
            )
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "fallbacks": dict(self.fallbacks),
            "stand_ins": dict(self.stand_ins),
        }

    def __str__(self) -> str:
        return render_text([*self.summary_lines(), *self.tables()])

    def render_verification(self) -> str:
        """The table of the buckets that were verified, and of those that could not be compiled, why."""
        failed = [
            bucket
            for bucket in self.buckets
            if bucket.verification is None and bucket.failure is not None
        ]
        reasons = [f"{bucket.bucket} could not be verified: {bucket.failure}" for bucket in failed]
        return render_text([self._verification_table(), *reasons])

    def summary_lines(self) -> list[str]:
        """Facts, warnings, and what sums the tables up."""
        return [
            *(f"{name}: {value}" for name, value in self.facts.items()),
            *(f"warning: {warning}" for warning in self.warnings),
            f"CUDA graphs: {self.graphs}, in a pool of {_mib(self.pool_bytes)} MiB",
            f"padding: {self.padding_waste:.1%} of the tokens computed in buckets",
        ]

    def tables(self) -> Iterator[ReportTable]:
        """All that is counted, as tables."""
        phases = [(phase.name, f"{phase.seconds:.2f}", _mib(phase.bytes)) for phase in self.phases]
        yield ReportTable("phases", ["phase", "seconds", "MiB"], phases)
        yield ReportTable("buckets", _BUCKET, [_bucket_row(bucket) for bucket in self.buckets])
        columns = ["pass", "bucket", "matches", "expected", "seconds", "ops before", "ops after"]
        yield ReportTable(
            "passes", columns, [_pass_row(b.bucket, p) for b in self.buckets for p in b.passes]
        )
        if any(bucket.verification for bucket in self.buckets):
            yield self._verification_table()
        yield ReportTable(
            "eager fallbacks",
            ["reason", "steps"],
            [(r, str(n)) for r, n in self.fallbacks.items()] or [("none", "0")],
        )
        if self.stand_ins:
            yield ReportTable(
                "other buckets",
                ["reason", "steps"],
                [(r, str(n)) for r, n in self.stand_ins.items()],
            )
        counts = [
            (name.replace("_", " "), f"{value:.6g}")
            for name, value in asdict(self.scheduling).items()
        ]
        yield ReportTable("scheduling", ["what", "count"], counts)
        yield ReportTable(
            "graph events",
            ["event", "count"],
            [(name, str(count)) for name, count in self.graph_events.items()],
        )

    def _verification_table(self) -> ReportTable:
        found = [
            _verified_row(bucket.bucket, bucket.verification)
            for bucket in self.buckets
            if bucket.verification is not None
        ]
        return ReportTable("verification", _VERIFIED, found)


_SECONDS = ["trace s", "compile s", "tune s", "capture s"]
_BUCKET = ["bucket", "state", "made by", *_SECONDS, "MiB", "replays", "padded tokens", "failure"]


def _bucket_row(bucket: BucketReport) -> list[str]:
    spent = (
        bucket.trace_seconds,
        bucket.compile_seconds,
        bucket.autotune_seconds,
        bucket.capture_seconds,
    )
    seconds = [f"{part:.2f}" for part in spent]
    counts = (_mib(bucket.bytes), str(bucket.replays), str(bucket.padded))
    maker = (
        "artifact"
        if bucket.loaded
        else "compiling"
        if bucket.state not in (BucketState.PENDING, BucketState.LEFT_OUT)
        else ""
    )
    return [bucket.bucket, bucket.state, maker, *seconds, *counts, bucket.failure or ""]


_VERIFIED = [
    "bucket",
    "rows",
    "top-1",
    "logit difference",
    "choice gap",
    "KV difference",
    "in std",
    "allowed",
    "outcome",
]


def _verified_row(bucket: str, found: Verification) -> list[str]:
    logits = "not kept" if found.logit_difference is None else f"{found.logit_difference:.2g}"
    errors = (
        logits,
        *(
            f"{value:.2g}"
            for value in (found.choice_gap, found.cache_difference, found.error, found.allowed)
        ),
    )
    return [bucket, str(found.rows), f"{found.agreement:.1%}", *errors, found.failure or "equal"]


def _pass_row(bucket: str, report: PassReport) -> list[str]:
    counts = (
        str(report.matches),
        str(report.expected),
        f"{report.seconds:.3f}",
        str(report.ops_before),
        str(report.ops_after),
    )
    return [report.name, bucket, *counts]


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f}"
