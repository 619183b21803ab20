"""Where the seconds of a compilation went: tracing, compiling, timing variants of kernels, capturing."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from torch._dynamo.utils import compilation_time_metrics

from compiled_llm.report.report import BucketReport, PhaseReport

_AUTOTUNING = ("CachingAutotuner.", "_template_autotuning", "_template_precompiling")


class Durations(TypedDict):
    """Seconds, of which none is in two of them."""

    trace_seconds: float
    compile_seconds: float
    autotune_seconds: float
    capture_seconds: float


@dataclass(frozen=True, slots=True)
class Timestamp:
    """A time, and the seconds that torch's compiler had spent by then, in this process, on tracing and on autotuning."""

    time: float
    trace: float
    autotune: float

    @classmethod
    def now(cls) -> "Timestamp":
        attempts = sum(
            sum(spent)
            for name, spent in compilation_time_metrics.items()
            if name.startswith("compile_attempt_")
        )
        backend = sum(compilation_time_metrics.get("OutputGraph.call_user_compiler", []))
        tuned = (
            spent
            for name, spent in compilation_time_metrics.items()
            if any(part in name for part in _AUTOTUNING)
        )
        return cls(time.perf_counter(), attempts - backend, sum(map(sum, tuned)))


def durations(began: Timestamp, compiled: Timestamp, captured: Timestamp) -> Durations:
    """Of one bucket; the kernels' first run, which belongs to the capture, may time variants too."""
    trace, tuned, tuned_later = (
        captured.trace - began.trace,
        compiled.autotune - began.autotune,
        captured.autotune - compiled.autotune,
    )
    return {
        "trace_seconds": trace,
        "compile_seconds": max(0.0, compiled.time - began.time - trace - tuned),
        "autotune_seconds": tuned + tuned_later,
        "capture_seconds": max(0.0, captured.time - compiled.time - tuned_later),
    }


def split_phase(total: PhaseReport, buckets: Sequence[BucketReport]) -> list[PhaseReport]:
    """The phase in which these buckets were made, in parts; `other` is what none of them accounts for, such as keeping files."""
    parts = {
        "trace": sum(bucket.trace_seconds for bucket in buckets),
        "compile": sum(bucket.compile_seconds for bucket in buckets if not bucket.loaded),
        "load compiled": sum(bucket.compile_seconds for bucket in buckets if bucket.loaded),
        "autotune": sum(bucket.autotune_seconds for bucket in buckets),
        "capture": sum(bucket.capture_seconds for bucket in buckets),
    }
    parts["other"] = max(0.0, total.seconds - sum(parts.values()))
    return [
        PhaseReport(name=name, seconds=parts[name], bytes=total.bytes if name == "capture" else 0)
        for name in parts
    ]
