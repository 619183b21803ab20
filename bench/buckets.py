"""`bench buckets`: a decode step at every batch size, its bucket, and the largest jump."""

from dataclasses import asdict
from typing import Any

from bench.decode import DecodeSettings, time_decode
from bench.display import BOUND_COLUMN, HOST_COLUMNS, STEP_COLUMNS, Column, times
from bench.figures import Draw, lines
from bench.roofline import Roofline
from bench.run import BenchRun, CommandResult
from bench.stats import summarize
from bench.worker_group import WorkerGroup, start_workers

_COLUMNS = (
    Column("batch", "batch"),
    Column("bucket", "bucket"),
    *STEP_COLUMNS,
    BOUND_COLUMN,
    *HOST_COLUMNS,
    Column("x batch before", "step_ratio", times),
)


def run(bench: BenchRun, settings: DecodeSettings, *, max_batch: int | None) -> None:
    """Run the command.

    Args:
        bench: the run.
        settings: how steps are timed.
        max_batch: largest batch size; `limits.max_num_seqs` if None.

    Raises:
        ValueError: `max_batch` exceeds `limits.max_num_seqs`.
    """
    limit = bench.roofline.max_num_seqs
    last = max_batch or limit
    if last > limit:
        raise ValueError(
            f"--largest {last}: expected at most limits.max_num_seqs={limit}; "
            "lower it or raise the limit"
        )
    bench.reserve(settings.max_sequence_length(last, bench.roofline.max_num_batched_tokens))
    with start_workers(["ours"], bench.config, bench.roofline, bench.options) as workers:
        rows = measure(workers, bench.roofline, settings, max_batch=last)
        details = workers.describe()
    worst = largest_jump(rows)
    bench.finish(
        CommandResult(
            command="buckets",
            arguments={**asdict(settings), "largest": last},
            rows=rows,
            columns=_COLUMNS,
            plots=_plots(rows),
            note=_note(worst) if worst else None,
            details={"worst": worst, **details},
        )
    )


def measure(
    workers: WorkerGroup, roofline: Roofline, settings: DecodeSettings, *, max_batch: int
) -> list[dict[str, Any]]:
    """Return a row for each batch size from 1 to `max_batch`."""
    rows: list[dict[str, Any]] = []
    for batch in range(1, max_batch + 1):
        measured = time_decode(workers, "ours", batch, settings, roofline.vocab_size)
        if measured is None:
            rows.append({"batch": batch, "failure": workers.failures["ours"]})
            continue
        step = summarize(measured["step_ms"])
        before = rows[-1].get("step_ms") if rows else None
        rows.append(
            {
                "batch": batch,
                "bucket": measured["bucket"],
                "step_ms": step.median,
                "step_spread": step.spread,
                "host_us": summarize(measured["host_us"]).median,
                "padded_share": measured["padded_share"],
                "step_ratio": step.median / before if before else None,
                "min_step_ms": roofline.min_step_ms(batch, settings.context),
                "samples_ms": measured["step_ms"],
            }
        )
    return rows


def largest_jump(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the row with the largest ratio to the batch size before it, or None without one."""
    compared = [row for row in rows if row.get("step_ratio") is not None]
    return max(compared, key=lambda row: row["step_ratio"]) if compared else None


def _note(worst: dict[str, Any]) -> str:
    ratio = f"{worst['step_ratio']:.2f}x"
    return f"largest jump: {ratio} at batch {worst['batch']}, in bucket {worst['bucket']}"


def _plots(rows: list[dict[str, Any]]) -> list[Draw]:
    ours = [{**row, "series": "ours"} for row in rows]
    bound = [
        {**row, "series": "bandwidth bound", "step_ms": row["min_step_ms"]}
        for row in rows
        if "min_step_ms" in row
    ]
    axes: dict[str, Any] = {"x": "batch", "by": "series", "log": False}
    return [
        lines([*ours, *bound], y="step_ms", labels=("batch", "ms per step"), **axes),
        lines(ours, y="padded_share", labels=("batch", "share of padding"), **axes),
    ]
