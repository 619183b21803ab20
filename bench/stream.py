"""`bench stream`: launches, host time and GPU idle time of a decode step, graphs against eager."""

from dataclasses import asdict
from typing import Any

from bench.decode import DecodeSettings, time_decode
from bench.display import Column, number, percent
from bench.figures import bars, timelines
from bench.roofline import Roofline
from bench.run import BenchRun, CommandResult
from bench.stats import summarize
from bench.trace import busy_us
from bench.worker_group import WorkerGroup, start_workers

_TIMELINE_STEPS = 4  # steps whose spans the record holds
_COLUMNS = (
    Column("system", "system"),
    Column("bucket", "mode"),
    Column("launches per step", "launches", number(1)),
    Column("kernels and copies", "device_spans", number(1)),
    Column("host us per step", "host_us", number(1)),
    Column("ms per step", "step_ms", number(4)),
    Column("GPU busy us", "busy_us", number(1)),
    Column("GPU idle", "idle_share", percent),
)
_CPU_NOTE = "on a CPU there are no launches and no idle time: host time is the whole step"


def run(bench: BenchRun, names: list[str], settings: DecodeSettings, *, batch: int) -> None:
    """Run the command on systems of ours."""
    max_num_batched_tokens = bench.roofline.max_num_batched_tokens
    bench.reserve(settings.max_sequence_length(batch, max_num_batched_tokens))
    with start_workers(names, bench.config, bench.roofline, bench.options) as workers:
        rows = measure(workers, names, bench.roofline, settings, batch=batch)
        details = workers.describe()
    on_gpu = bench.roofline.device == "cuda"
    steps = bars(rows, x="system", ys=["step_ms"], label="ms per step")
    bench.finish(
        CommandResult(
            command="stream",
            arguments={"systems": names, "batch": batch, **asdict(settings)},
            rows=rows,
            columns=_COLUMNS,
            plots=[steps, timelines(rows)] if on_gpu else [steps],
            note=None if on_gpu else _CPU_NOTE,
            details=details,
        )
    )


def measure(
    workers: WorkerGroup,
    names: list[str],
    roofline: Roofline,
    settings: DecodeSettings,
    *,
    batch: int,
) -> list[dict[str, Any]]:
    """Return a row for each system.

    Steps are timed without the profiler, which then gives the device's busy time; the idle share is
    the rest of the step.
    """
    rows = []
    for name in names:
        row: dict[str, Any] = {"system": name, "batch": batch}
        timed = time_decode(workers, name, batch, settings, roofline.vocab_size)
        profiled = None
        if timed is not None:
            arguments = {"context": settings.context, "steps": settings.steps}
            profiled = workers.call(
                name, "profile", batch=batch, vocab_size=roofline.vocab_size, **arguments
            )
        if timed is None or profiled is None:
            rows.append(row | {"failure": workers.failures[name]})
            continue
        row["step_ms"] = summarize(timed["step_ms"]).median
        row["host_us"] = summarize(timed["host_us"]).median
        row["mode"] = timed["bucket"]
        rows.append(row | _device_activity(profiled, row["step_ms"] * 1e3))
    return rows


def _device_activity(profiled: dict[str, Any], step_us: float) -> dict[str, Any]:
    """Return launches, spans and busy time per step, and the timeline of the first steps."""
    steps, spans = profiled["steps"], profiled["spans"]
    if not spans:
        return {"launches": None, "timeline": []}
    busy = busy_us(spans) / steps
    shown = spans[: _TIMELINE_STEPS * len(spans) // steps]
    return {
        "launches": sum(profiled["launches"].values()) / steps,
        "launch_kinds": {kind: count / steps for kind, count in profiled["launches"].items()},
        "device_spans": len(spans) / steps,
        "busy_us": busy,
        "idle_share": max(0.0, 1 - busy / step_us),
        "timeline": [(round(begin, 2), round(end, 2)) for begin, end, _ in shown],
    }
