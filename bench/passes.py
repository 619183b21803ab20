"""`bench passes`: what each pass earns, by running without it.

Every variant has an engine in a fresh process, one after another; all passes on come first and last again, so that what the
machine drifted meanwhile can be seen beside what the passes earn.
"""

from typing import Any

from bench.roofline import Roofline
from bench.stats import figure
from bench.systems import SYSTEMS
from bench.worker_group import Options, WorkerGroup, setup_of
from compiled_llm.config.schema import Config

ALL, AGAIN = "all on", "all on, again"


def variants(config: Config, only: list[str]) -> dict[str, Config]:
    """The config with all its passes, with each of them off in turn, and with all of them again."""
    names = [name for name in config.pass_order() if not only or name in only]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ValueError(
            f"--only {', '.join(unknown)}: expected passes that the config has on: {', '.join(config.pass_order())}"
        )
    without = {
        f"without {name}": config.model_copy(update={"passes": {**config.passes, name: False}})
        for name in names
    }
    return {ALL: config, **without, AGAIN: config}


def run(
    config: Config,
    card: Roofline,
    options: Options,
    *,
    only: list[str],
    batches: list[int],
    context: int,
    steps: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """A row for each variant and batch size; a variant that cannot run says why."""
    rows = []
    for name, variant in variants(config, only).items():
        session = WorkerGroup()
        try:
            session.start(name, setup_of(variant, card), options, target=SYSTEMS["ours"])
            for batch in batches:
                rows.append(_row(session, name, batch, context, steps, rounds, card))
        finally:
            session.close()
    for row in rows:
        row.update(_earned(row, rows))
    return rows


def _row(
    session: WorkerGroup,
    name: str,
    batch: int,
    context: int,
    steps: int,
    rounds: int,
    card: Roofline,
) -> dict[str, Any]:
    arguments = {
        "batch": batch,
        "context": context,
        "steps": steps,
        "rounds": rounds,
        "vocab_size": card.vocab_size,
    }
    measured = session.call(name, "decode", **arguments) if name in session.workers else None
    if measured is None:
        return {"variant": name, "batch": batch, "failure": session.failures[name]}
    step = figure(measured["step_ms"])
    return {
        "variant": name, "batch": batch, "bucket": measured["bucket"], "step_ms": step.median, "step_spread": step.spread,
        "samples_ms": measured["step_ms"],
    }  # fmt: skip


def _earned(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    """What a step takes longer than with all passes on, in microseconds and as a share."""
    base = [
        other["step_ms"]
        for other in rows
        if other["variant"] in {ALL, AGAIN}
        and other["batch"] == row["batch"]
        and "step_ms" in other
    ]
    if not base or "step_ms" not in row or row["variant"] == ALL:
        return {}
    usual = base[0] if row["variant"] == AGAIN else sum(base) / len(base)
    return {"earned_us": (row["step_ms"] - usual) * 1e3, "earned_share": row["step_ms"] / usual - 1}
