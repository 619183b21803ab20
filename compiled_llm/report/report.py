"""What an engine did and what it cost: start-up, buckets, step counters and warnings."""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import torch

from compiled_llm.system.device_memory import used_bytes
from passes import PassReport

_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class PhaseReport:
    """One phase of the start-up.

    Attributes:
        name: of the phase.
        seconds: wall time.
        bytes: growth of the memory in use (see `used_bytes`); 0 for a part of a phase.
    """

    name: str
    seconds: float
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Comparison of a bucket with the same steps run eagerly, on random batches.

    Attributes:
        batches: number of batches.
        rows: number of rows in all batches.
        agreement: the fraction of rows with the same token (top-1, where a row is greedy).
        logit_difference: the largest difference; None if the bucket's step stores no logits, so
            that only its tokens can be compared.
        choice_gap: the largest difference between the logit of the token that the bucket chose and
            the logit of the right token; the logits differ by at least half of it.
        cache_difference: the largest difference among the keys and values written.
        error: the largest of these differences (half of the gap), in standard deviations of the
            compared values.
        allowed: the largest `error` that passes.
        failure: the reason why the bucket is not used, or None.
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
        bucket: the name.
        size: tokens of a step.
        state: see `BucketState`.
        loaded: whether an artifact held it; `compile_seconds` is then the time to load it.
        saved: whether an artifact holds it now.
        save_failure: the reason why it could not be saved, or None.
        trace_seconds: time to trace the step.
        compile_seconds: time to compile it, without autotuning.
        autotune_seconds: time to autotune its kernels.
        capture_seconds: time of two calls, in which the CUDA graph is recorded.
        bytes: device memory of its recording: the growth of the memory pool, and the driver's
            memory for the graph.
        replays: number of steps that ran in it.
        padded: number of padding tokens in these steps.
        failure: the reason why it is not used, or None.
        verification: the result of `verify`, or None.
        passes: the reports of its graph passes; empty if Inductor's cache held the graph.
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
    """Counts of the scheduler.

    Attributes:
        steps: steps launched.
        decode_steps: steps with decoding rows only.
        tokens: tokens computed, of prompts and outputs.
        cached_tokens: prompt tokens whose blocks were found in the prefix cache.
        preemptions: number of times that a request lost its blocks and was computed again.
        processor_calls: tokens sampled outside the graph, by logits processors of requests.
        recoveries: calls that an exception interrupted, after which running requests ended with
            an error.
        host_seconds: CPU time of the thread that runs the steps.
        wait_seconds: time that it waited for the device.
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
class StartupReport:
    """What the start-up did.

    Attributes:
        facts: descriptions of the engine, by name.
        phases: in order.
        artifact_refusal: the reason why an artifact was not used, that of the configured one
            first; None if none was refused.
    """

    facts: dict[str, str | int] = field(default_factory=dict)
    phases: list[PhaseReport] = field(default_factory=list)
    artifact_refusal: str | None = None


@dataclass(slots=True)
class StepCounters:
    """Counts of steps that no bucket or another bucket served, and of CUDA graphs.

    Attributes:
        graphs: number of recorded CUDA graphs.
        pool_bytes: the memory pool that they share.
        fallbacks: steps that ran eagerly, by reason.
        stand_ins: steps that ran in a larger or more expensive bucket than necessary, by reason.
        graph_events: graph skips, recompiles and re-records during steps; all zero in a healthy
            engine. A direct replay cannot cause any and is not counted.
    """

    graphs: int = 0
    pool_bytes: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    stand_ins: Counter[str] = field(default_factory=Counter)
    graph_events: dict[str, int] = field(default_factory=dict)

    def count_fallback(self, reason: str, *, expected: bool) -> None:
        """Count a step that runs eagerly; log a reason once, as a warning unless `expected`."""
        if reason not in self.fallbacks:
            level = logging.INFO if expected else logging.WARNING
            _log.log(level, "a step runs eagerly: %s", reason)
        self.fallbacks[reason] += 1

    def count_stand_in(self, reason: str) -> None:
        """Count a step that runs in another bucket than the best one; log a reason once."""
        if reason not in self.stand_ins:
            _log.info("a step runs in another bucket: %s", reason)
        self.stand_ins[reason] += 1


@dataclass(slots=True)
class Report:
    """All that an engine reports. `str()` formats it as tables; `to_dict()` is plain data.

    Attributes:
        startup: the start-up's facts and phases.
        buckets: the buckets, in any state.
        counters: counts of steps and CUDA graphs.
        scheduling: counts of the scheduler.
        warnings: settings that are not followed, and why.
    """

    startup: StartupReport = field(default_factory=StartupReport)
    buckets: list[BucketReport] = field(default_factory=list)
    counters: StepCounters = field(default_factory=StepCounters)
    scheduling: SchedulingReport = field(default_factory=SchedulingReport)
    warnings: list[str] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, str | int]:
        return self.startup.facts

    @property
    def phases(self) -> list[PhaseReport]:
        return self.startup.phases

    @property
    def fallbacks(self) -> Counter[str]:
        return self.counters.fallbacks

    @property
    def stand_ins(self) -> Counter[str]:
        return self.counters.stand_ins

    @property
    def graph_events(self) -> dict[str, int]:
        return self.counters.graph_events

    @property
    def padding_waste(self) -> float:
        """The fraction of padding in all tokens that steps in buckets computed."""
        padded = sum(bucket.padded for bucket in self.buckets)
        return padded / max(1, sum(bucket.replays * bucket.size for bucket in self.buckets))

    def warn(self, message: str) -> None:
        """Add a warning and log it."""
        self.warnings.append(message)
        _log.warning(message)

    @contextmanager
    def phase(self, name: str, device: torch.device) -> Iterator[None]:
        """Measure the time and the memory of a phase of the start-up."""
        begin, used = time.perf_counter(), used_bytes(device)
        yield
        seconds = time.perf_counter() - begin
        self.phases.append(PhaseReport(name=name, seconds=seconds, bytes=used_bytes(device) - used))
        _log.info("%s: %.2f s", name, seconds)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; the fields of `startup` and `counters` are not nested."""
        values = asdict(self)
        startup, counters = values.pop("startup"), values.pop("counters")
        # `asdict` does not copy a Counter correctly.
        counters["fallbacks"] = dict(self.fallbacks)
        counters["stand_ins"] = dict(self.stand_ins)
        return {**startup, **values, **counters}

    def __str__(self) -> str:
        from compiled_llm.report.tables import render_report

        return render_report(self)

    def render_verification(self) -> str:
        """Return the verified buckets as a table, followed by those that could not be compiled."""
        from compiled_llm.report.tables import render_verification

        return render_verification(self)
