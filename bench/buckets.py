"""`bench buckets`: every batch size from 1, its bucket, and the cliffs between them."""

from typing import Any

from bench.roofline import Roofline
from bench.stats import figure
from bench.worker_group import WorkerGroup


def run(
    session: WorkerGroup, card: Roofline, *, context: int, steps: int, rounds: int, largest: int
) -> list[dict[str, Any]]:
    """A row for each batch size: the step's time and bucket, its padded share, and its time against the batch one smaller."""
    rows: list[dict[str, Any]] = []
    for batch in range(1, largest + 1):
        arguments = {
            "batch": batch,
            "context": context,
            "steps": steps,
            "rounds": rounds,
            "vocab_size": card.vocab_size,
        }
        measured = (
            session.call("ours", "decode", **arguments) if "ours" in session.workers else None
        )
        if measured is None:
            rows.append({"batch": batch, "failure": session.failures["ours"]})
            continue
        step = figure(measured["step_ms"])
        before = rows[-1].get("step_ms") if rows else None
        rows.append(
            {
                "batch": batch,
                "bucket": measured["bucket"],
                "step_ms": step.median,
                "step_spread": step.spread,
                "host_us": figure(measured["host_us"]).median,
                "padded_share": measured["padded_share"],
                "step_ratio": step.median / before if before else None,
                "least_ms": card.least_ms(batch, context),
                "samples_ms": measured["step_ms"],
            }
        )
    return rows


def worst(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row whose step is the longest beside the one before it; None where there is no such pair."""
    found = [row for row in rows if row.get("step_ratio") is not None]
    return max(found, key=lambda row: row["step_ratio"]) if found else None
