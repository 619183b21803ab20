"""Durations of a compilation: tracing, compiling, autotuning kernels and capturing."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from compiled_llm.report.report import BucketReport, PhaseReport
from compiled_llm.system.torch_patches import COMPILATION_TIMES

_AUTOTUNING = ("CachingAutotuner.", "_template_autotuning", "_template_precompiling")


class Durations(TypedDict):
    """Seconds of one bucket; no second is counted twice."""

    trace_seconds: float
    compile_seconds: float
    autotune_seconds: float
    capture_seconds: float


@dataclass(frozen=True, slots=True)
class Timestamp:
    """A time, and the seconds of tracing and autotuning in this process until then."""

    time: float
    trace: float
    autotune: float

    @classmethod
    def now(cls) -> "Timestamp":
        spent: dict[str, list[float]] = COMPILATION_TIMES.get()
        attempts = sum(
            sum(seconds) for name, seconds in spent.items() if name.startswith("compile_attempt_")
        )
        backend = sum(spent.get("OutputGraph.call_user_compiler", []))
        autotuning = sum(
            sum(seconds)
            for name, seconds in spent.items()
            if any(part in name for part in _AUTOTUNING)
        )
        return cls(time.perf_counter(), attempts - backend, autotuning)


def durations(began: Timestamp, compiled: Timestamp, captured: Timestamp) -> Durations:
    """Split the time between three timestamps of one bucket.

    Autotuning is counted apart wherever it happens: the first run of a kernel, in the capture, may
    autotune it too.
    """
    trace = captured.trace - began.trace
    tuned = compiled.autotune - began.autotune
    tuned_in_capture = captured.autotune - compiled.autotune
    return {
        "trace_seconds": trace,
        "compile_seconds": max(0.0, compiled.time - began.time - trace - tuned),
        "autotune_seconds": tuned + tuned_in_capture,
        "capture_seconds": max(0.0, captured.time - compiled.time - tuned_in_capture),
    }


def split_phase(total: PhaseReport, buckets: Sequence[BucketReport]) -> list[PhaseReport]:
    """Split the phase that compiled these buckets into parts.

    The part `other` is the remainder, such as writing files.
    """
    parts = {
        "trace": sum(bucket.trace_seconds for bucket in buckets),
        "compile": sum(bucket.compile_seconds for bucket in buckets if not bucket.loaded),
        "load compiled": sum(bucket.compile_seconds for bucket in buckets if bucket.loaded),
        "autotune": sum(bucket.autotune_seconds for bucket in buckets),
        "capture": sum(bucket.capture_seconds for bucket in buckets),
    }
    parts["other"] = max(0.0, total.seconds - sum(parts.values()))
    return [
        PhaseReport(name=name, seconds=seconds, bytes=total.bytes if name == "capture" else 0)
        for name, seconds in parts.items()
    ]
