"""What the commands do: a card, the systems in turns, a table, a plot, a dated file, and one JSON object as the last line."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import buckets, kernel_runs, latency, passes, startup, stream, throughput
from bench.display import Column, number, percent, show_card, show_table, times
from bench.figures import Draw, bars, lines, save_figure, timelines
from bench.record import make_record, model_name, save
from bench.roofline import Roofline
from bench.trace import idle_between_launches
from bench.worker_group import Options, WorkerGroup, fitted, measured_card, started
from bench.workloads import Workload
from compiled_llm.config.schema import Config

_TEXT: Any = str
_STEP: list[Column] = [
    ("ms a step", "step_ms", number(4)),
    ("spread", "step_spread", percent),
    ("ms to read it all", "least_ms", number(4)),
    ("host us", "host_us", number(1)),
    ("padded", "padded_share", percent),
]


@dataclass(slots=True, kw_only=True)
class Bench:
    """One run: a config, the card of its model and machine, and where results go."""

    config: Config
    roofline: Roofline
    options: Options
    out: Path

    @classmethod
    def begin(cls, config: Config, options: Options, out: Path) -> "Bench":
        """Measure and show the card."""
        card = measured_card(config, options)
        show_card(card)
        return cls(config=config, roofline=card, options=options, out=out)

    def fit(self, longest: int) -> None:
        """Make room for sequences of so many tokens."""
        self.config, self.roofline = fitted(self.config, self.roofline, longest)

    def finish(
        self,
        command: str,
        arguments: dict[str, Any],
        result: dict[str, Any],
        columns: Sequence[Column],
        draws: Sequence[Draw] = (),
        note: str | None = None,
    ) -> None:
        """Show the rows, and keep everything; a note stands below the table."""
        rows, name = result["rows"], model_name(self.config)
        title = f"{command}: {self.roofline.model}, {self.roofline.device_name}"
        show_table(title, columns, rows)
        if note is not None:
            print(note, file=sys.stderr)
        record = make_record(command, self.config, self.roofline, arguments, result)
        path = save(record, self.out, name)
        drawn = save_figure(path.with_suffix(".png"), title, *draws) if draws else None
        print(f"kept in {path}{f' and {drawn}' if drawn else ''}", file=sys.stderr)
        print(json.dumps(record), flush=True)


def run_latency(bench: Bench, names: list[str], plan: latency.Plan) -> None:
    bench.fit(plan.longest(bench.roofline.max_num_batched_tokens))
    with started(names, bench.config, bench.roofline, bench.options) as session:
        cells = latency.run(session, names, plan, bench.roofline)
        rows = latency.table(cells, plan, bench.roofline)
        result = {"rows": rows, "samples": latency.samples(cells), **_of_session(session)}
    columns: list[Column] = [
        ("system", "system", _TEXT),
        ("batch", "batch", _TEXT),
        *_STEP[:3],
        ("tokens/s", "tokens_per_second", number(1)),
        (f"x {names[0]}", "step_ratio", times),
        ("ms to first token", "first_token_ms", number(2)),
        ("spread", "first_spread", percent),
        (f"x {names[0]}", "first_ratio", times),
        *_STEP[3:],
        ("eager steps", "fallbacks", _TEXT),
    ]
    least = [
        {**row, "system": "reading it all", "step_ms": row["least_ms"]}
        for row in rows
        if row.get("least_ms") is not None
    ]
    draws = [
        lines([*rows, *least], x="batch", y="step_ms", by="system", labels=("batch", "ms a step")),
        lines(
            rows, x="batch", y="first_token_ms", by="system", labels=("batch", "ms to first token")
        ),
    ]
    bench.finish("latency", {"systems": names, **asdict(plan)}, result, columns, draws)


def run_throughput(
    bench: Bench, names: list[str], mix: throughput.Mix, *, rounds: int, profile: int
) -> None:
    workload = mix.workload(bench.config, bench.roofline)
    bench.fit(workload.longest)
    with started(names, bench.config, bench.roofline, bench.options) as session:
        runs = throughput.run(session, names, workload, rounds=rounds)
        rows = throughput.table(session, runs, workload)
        for row in rows if profile else []:
            row |= _idle(session, row["system"], workload, profile)
        result = {
            "rows": rows,
            "samples": [
                {
                    "system": each.system,
                    "rounds": [asdict(g) | {"counts": None} for g in each.rounds],
                }
                for each in runs
            ],
            "prompt_tokens": workload.num_prompt_tokens,
            "output_tokens": workload.num_output_tokens,
            **_of_session(session),
        }
    columns: list[Column] = [
        ("system", "system", _TEXT),
        ("output tokens/s", "tokens_per_second", number(1)),
        (f"x {names[0]}", "ratio", times),
        ("seconds", "seconds", number(3)),
        ("spread", "spread", percent),
        ("steps", "steps", number(0)),
        ("host us a step", "host_us", number(1)),
        ("padded", "padded_share", percent),
        ("idle, decode", "idle_decode", percent),
        ("idle, prefill", "idle_prefill", percent),
        ("preemptions", "preemptions", number(0)),
        ("eager steps", "fallbacks", number(0)),
        ("s to ready", "ready_s", number(1)),
    ]
    draws = [bars(rows, x="system", ys=["tokens_per_second"], label="output tokens a second")]
    arguments = {
        "systems": names,
        "rounds": rounds,
        **asdict(mix),
        "sharegpt": str(mix.sharegpt) if mix.sharegpt else None,
    }
    bench.finish("throughput", arguments, result, columns, draws)


def run_startup(bench: Bench, names: list[str], *, context: int, rounds: int) -> None:
    bench.fit(context + 1)
    rows = startup.run(
        names, bench.config, bench.roofline, bench.options, context=context, rounds=rounds
    )
    for row in rows:
        row["label"] = f"{row['system']}, {row['caches']}"
    columns: list[Column] = [
        ("system", "system", _TEXT),
        ("caches", "caches", _TEXT),
        ("round", "round", _TEXT),
        ("s to first token", "total", number(2)),
        *((name, name, number(2)) for name in startup.PHASES),
    ]
    draws = [bars(rows, x="label", ys=startup.PHASES, label="seconds to the first token")]
    bench.finish(
        "startup",
        {"systems": names, "context": context, "rounds": rounds},
        {"rows": rows},
        columns,
        draws,
    )


def run_buckets(
    bench: Bench, *, context: int, steps: int, rounds: int, largest: int | None
) -> None:
    last = largest or bench.roofline.max_num_seqs
    if last > bench.roofline.max_num_seqs:
        raise ValueError(
            f"--largest {last} is above limits.max_num_seqs={bench.roofline.max_num_seqs}: lower it or raise the limit"
        )
    bench.fit(_room(bench, [last], context, steps, rounds))
    with started(["ours"], bench.config, bench.roofline, bench.options) as session:
        rows = buckets.run(
            session, bench.roofline, context=context, steps=steps, rounds=rounds, largest=last
        )
        cliff = buckets.worst(rows)
        result = {"rows": rows, "worst": cliff, **_of_session(session)}
    columns: list[Column] = [
        ("batch", "batch", _TEXT),
        ("bucket", "bucket", _TEXT),
        *_STEP,
        ("x one less", "step_ratio", times),
    ]
    for row in rows:
        row["series"] = "ours"
    least = [
        {**row, "series": "reading it all", "step_ms": row["least_ms"]}
        for row in rows
        if "least_ms" in row
    ]
    draws = [
        lines(
            [*rows, *least],
            x="batch",
            y="step_ms",
            by="series",
            labels=("batch", "ms a step"),
            log=False,
        ),
        lines(
            rows,
            x="batch",
            y="padded_share",
            by="series",
            labels=("batch", "share of padding"),
            log=False,
        ),
    ]
    arguments = {"context": context, "steps": steps, "rounds": rounds, "largest": last}
    note = (
        f"the steepest step is to batch {cliff['batch']}, {cliff['step_ratio']:.2f}x, in {cliff['bucket']}"
        if cliff
        else None
    )
    bench.finish("buckets", arguments, result, columns, draws, note)


def run_passes(
    bench: Bench, *, only: list[str], batches: list[int], context: int, steps: int, rounds: int
) -> None:
    passes.variants(bench.config, only)
    bench.fit(_room(bench, batches, context, steps, rounds))
    sizes = {"batches": batches, "context": context, "steps": steps, "rounds": rounds}
    rows = passes.run(bench.config, bench.roofline, bench.options, only=only, **sizes)  # type: ignore[arg-type]
    columns: list[Column] = [
        ("passes", "variant", _TEXT),
        ("batch", "batch", _TEXT),
        *_STEP[:2],
        ("pass earns, us", "earned_us", number(1)),
        ("of the step", "earned_share", percent),
        ("bucket", "bucket", _TEXT),
    ]
    for row in rows:
        row["label"] = f"{row['variant']}, {row['batch']}"
    draws = [
        bars(
            [row for row in rows if row["variant"] != passes.ALL],
            x="label",
            ys=["earned_us"],
            label="us a step earned",
        )
    ]
    bench.finish("passes", {"only": only, **sizes}, {"rows": rows}, columns, draws)


def run_stream(
    bench: Bench, names: list[str], *, batch: int, context: int, steps: int, rounds: int
) -> None:
    bench.fit(_room(bench, [batch], context, steps, rounds))
    with started(names, bench.config, bench.roofline, bench.options) as session:
        rows = stream.run(
            session, names, bench.roofline, batch=batch, context=context, steps=steps, rounds=rounds
        )
        result = {"rows": rows, **_of_session(session)}
    columns: list[Column] = [
        ("system", "system", _TEXT),
        ("bucket", "mode", _TEXT),
        ("launches a step", "launches", number(1)),
        ("kernels and copies", "device_spans", number(1)),
        ("host us a step", "host_us", number(1)),
        ("ms a step", "step_ms", number(4)),
        ("GPU busy us", "busy_us", number(1)),
        ("GPU idle", "idle_share", percent),
    ]
    draws = [
        bars(rows, x="system", ys=["step_ms"], label="ms a step"),
        *([timelines(rows)] if bench.roofline.device == "cuda" else []),
    ]
    arguments = {
        "systems": names,
        "batch": batch,
        "context": context,
        "steps": steps,
        "rounds": rounds,
    }
    note = "a CPU has no launches to count and no device that waits: host time is all of the step"
    bench.finish(
        "stream",
        arguments,
        result,
        columns,
        draws,
        note if bench.roofline.device == "cpu" else None,
    )


def run_kernels(bench: Bench, *, only: str | None) -> None:
    rows = kernel_runs.run(bench.roofline, only=only)
    columns: list[Column] = [
        ("kind", "kind", _TEXT),
        ("sequences x tokens - heads", "shape", _TEXT),
        ("kernel", "kernel", _TEXT),
        ("us", "us", number(2)),
        ("x paged", "ratio", times),
        ("GB/s", "gb_per_second", number(1)),
        ("of the read bandwidth", "bandwidth_share", percent),
        ("TFLOP/s", "tflops", number(2)),
    ]
    decode = [
        {**row, "label": f"{row['shape']} {row['kernel']}"}
        for row in rows
        if row["kind"] == "decode"
    ]
    draws = (
        [bars(decode, x="label", ys=["gb_per_second"], label="GB/s of keys and values, decode")]
        if decode
        else []
    )
    bench.finish("kernels", {"only": only}, {"rows": rows}, columns, draws)


def _of_session(session: WorkerGroup) -> dict[str, Any]:
    """What a reader should know of the systems: versions and settings, the start, failures, and our own counters."""
    reports = {
        name: session.call(name, "report")
        for name in list(session.workers)
        if name.startswith("ours")
    }
    for name, report in reports.items():
        for reason, steps in (report or {}).get("fallbacks", {}).items():
            print(f"{name}: {steps} steps ran eagerly: {reason}", file=sys.stderr)
    return {
        "systems": session.described,
        "ready_seconds": session.ready_seconds,
        "failures": session.failures,
        "reports": {name: report for name, report in reports.items() if report is not None},
    }


def _idle(
    session: WorkerGroup, name: str, workload: Workload, steps: int
) -> dict[str, float | None]:
    """How long the GPU waits between two launches, for our own engines."""
    if not name.startswith("ours") or name not in session.workers:
        return {}
    asked = {
        "prompts": workload.prompts,
        "output_lengths": workload.output_lengths,
        "temperature": workload.temperature,
    }
    spans = session.call(name, "profile_workload", steps=steps, **asked) or {}
    return {f"idle_{kind}": idle_between_launches(found) for kind, found in spans.items()}


def _room(bench: Bench, batches: list[int], context: int, steps: int, rounds: int) -> int:
    """Tokens of a sequence that decodes in all rounds, and while others join."""
    return (
        context
        + 2
        + steps * (rounds + 2)
        + -(-max(batches) * context // bench.roofline.max_num_batched_tokens)
    )
