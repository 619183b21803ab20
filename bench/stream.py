"""`bench stream`: the same decode steps as one graph launch each and as eager calls: launches, host time, and a waiting GPU."""

from typing import Any

from bench.roofline import Roofline
from bench.stats import figure
from bench.trace import busy_us
from bench.worker_group import WorkerGroup

_KEPT = 4  # steps whose spans are kept for the timeline


def run(
    session: WorkerGroup,
    names: list[str],
    card: Roofline,
    *,
    batch: int,
    context: int,
    steps: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """A row for each system.

    Times are of steps without a profiler; the profiler tells how long the device works, and the idle share is what is left of
    the step. On a CPU there is nothing to launch, and host time is all of the step.
    """
    rows = []
    for name in names:
        row: dict[str, Any] = {"system": name, "batch": batch}
        arguments = {
            "batch": batch,
            "context": context,
            "steps": steps,
            "vocab_size": card.vocab_size,
        }
        timed = (
            session.call(name, "decode", rounds=rounds, **arguments)
            if name in session.workers
            else None
        )
        profiled = session.call(name, "profile", **arguments) if timed is not None else None
        if timed is None or profiled is None:
            rows.append(row | {"failure": session.failures[name]})
            continue
        row |= {
            "step_ms": figure(timed["step_ms"]).median,
            "host_us": figure(timed["host_us"]).median,
            "mode": timed["bucket"],
        }
        rows.append(row | _device(profiled, row["step_ms"] * 1e3))
    return rows


def _device(profiled: dict[str, Any], step_us: float) -> dict[str, Any]:
    """Per step: launches of each kind, kernels and copies, busy microseconds, the idle share, and the first steps' timeline."""
    steps, spans = profiled["steps"], profiled["spans"]
    if not spans:
        return {"launches": None, "timeline": []}
    busy = busy_us(spans) / steps
    return {
        "launches": sum(profiled["launches"].values()) / steps,
        "launch_kinds": {kind: count / steps for kind, count in profiled["launches"].items()},
        "device_spans": len(spans) / steps,
        "busy_us": busy,
        "idle_share": max(0.0, 1 - busy / step_us),
        "timeline": [
            (round(begin, 2), round(end, 2))
            for begin, end, _ in spans[: _KEPT * len(spans) // steps]
        ],
    }
