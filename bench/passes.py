"""`bench passes`: the time that each graph pass saves, measured by running without it.

Each variant runs in a fresh process, one after another. The variant with all passes on runs first
and last, so that drift of the machine can be compared with the savings.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bench.decode import DecodeSettings, time_decode
from bench.display import STEP_COLUMNS, Column, number, percent
from bench.figures import bars
from bench.run import BenchRun, CommandResult
from bench.stats import summarize
from bench.systems import SYSTEMS
from bench.worker_group import WorkerGroup, make_setup
from compiled_llm.config.schema import Config

ALL, AGAIN = "all on", "all on, again"
_COLUMNS = (
    Column("passes", "variant"),
    Column("batch", "batch"),
    *STEP_COLUMNS,
    Column("saved us", "saved_us", number(1)),
    Column("of the step", "saved_share", percent),
    Column("bucket", "bucket"),
)


def run(bench: BenchRun, settings: DecodeSettings, *, only: list[str], batches: list[int]) -> None:
    """Run the command.

    Args:
        bench: the run.
        settings: how steps are timed.
        only: passes to leave out in turn; all passes of the config if empty.
        batches: batch sizes.

    Raises:
        ValueError: `only` names a pass that is not on.
    """
    variants(bench.config, only)
    max_num_batched_tokens = bench.roofline.max_num_batched_tokens
    bench.reserve(settings.max_sequence_length(max(batches), max_num_batched_tokens))
    rows = measure(bench, settings, only=only, batches=batches)
    labelled = [
        {**row, "label": f"{row['variant']}, {row['batch']}"}
        for row in rows
        if row["variant"] != ALL
    ]
    bench.finish(
        CommandResult(
            command="passes",
            arguments={"only": only, "batches": batches, **asdict(settings)},
            rows=rows,
            columns=_COLUMNS,
            plots=[bars(labelled, x="label", ys=["saved_us"], label="us saved per step")],
        )
    )


def variants(config: Config, only: Sequence[str]) -> dict[str, Config]:
    """Return the config with all passes, with each pass off in turn, and with all passes again."""
    names = [name for name in config.pass_order() if not only or name in only]
    unknown = [name for name in only if name not in names]
    if unknown:
        enabled = ", ".join(config.pass_order())
        raise ValueError(
            f"--only {', '.join(unknown)}: expected passes that the config has on: {enabled}"
        )
    without = {
        f"without {name}": config.model_copy(update={"passes": {**config.passes, name: False}})
        for name in names
    }
    return {ALL: config, **without, AGAIN: config}


def measure(
    bench: BenchRun, settings: DecodeSettings, *, only: Sequence[str], batches: Sequence[int]
) -> list[dict[str, Any]]:
    """Return a row for each variant and batch size."""
    rows = []
    for name, variant in variants(bench.config, only).items():
        workers = WorkerGroup()
        try:
            setup = make_setup(variant, bench.roofline)
            workers.start(name, setup, bench.options, target=SYSTEMS["ours"])
            for batch in batches:
                rows.append(_row(workers, name, batch, settings, bench.roofline.vocab_size))
        finally:
            workers.close()
    for row in rows:
        row.update(_savings(row, rows))
    return rows


def _row(
    workers: WorkerGroup, name: str, batch: int, settings: DecodeSettings, vocab_size: int
) -> dict[str, Any]:
    measured = time_decode(workers, name, batch, settings, vocab_size)
    if measured is None:
        return {"variant": name, "batch": batch, "failure": workers.failures[name]}
    step = summarize(measured["step_ms"])
    return {
        "variant": name,
        "batch": batch,
        "bucket": measured["bucket"],
        "step_ms": step.median,
        "step_spread": step.spread,
        "samples_ms": measured["step_ms"],
    }


def _savings(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the additional time of a step compared with all passes on: us, and as a share."""
    base = [
        other["step_ms"]
        for other in rows
        if other["variant"] in {ALL, AGAIN}
        and other["batch"] == row["batch"]
        and "step_ms" in other
    ]
    if not base or "step_ms" not in row or row["variant"] == ALL:
        return {}
    base_ms = base[0] if row["variant"] == AGAIN else sum(base) / len(base)
    saved_us = (row["step_ms"] - base_ms) * 1e3
    return {"saved_us": saved_us, "saved_share": row["step_ms"] / base_ms - 1}
