"""`bench latency`: milliseconds per decode step and to the first tokens, by batch size.

All systems are measured in the same way, through `System.generate`. The time to the first tokens is
that of a call which generates one token for each of `batch` prompts. The time of a decode step is
the difference between two calls that generate `lead + steps` and `lead` tokens, divided by `steps`.
`lead` is large enough that all prompts have started before the first sequence finishes, so the
calls differ in full steps of `batch` sequences only.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.display import BOUND_COLUMN, HOST_COLUMNS, STEP_COLUMNS, Column, number, percent, times
from bench.figures import Draw, lines
from bench.roofline import Roofline
from bench.run import BenchRun, CommandResult
from bench.stats import median_ratio, summarize
from bench.systems import GenerateResult
from bench.worker_group import WorkerGroup, start_workers
from bench.workloads import random_prompts

_LEAD = 4  # tokens after which a system's first steps no longer affect its step time


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySettings:
    """What is measured.

    Attributes:
        batches: batch sizes.
        context: number of prompt tokens of each sequence.
        steps: number of decode steps of a sample.
        rounds: number of samples of each system.
    """

    batches: list[int]
    context: int
    steps: int
    rounds: int

    def max_sequence_length(self, max_num_batched_tokens: int) -> int:
        """Return the number of tokens of the longest sequence."""
        return self.context + self.lead(max(self.batches), max_num_batched_tokens) + self.steps

    def lead(self, batch: int, max_num_batched_tokens: int) -> int:
        """Return the output tokens after which all prompts of a batch have started."""
        return _LEAD + -(-batch * self.context // max_num_batched_tokens)


@dataclass(slots=True, kw_only=True)
class Measurement:
    """Samples of one system at one batch size.

    Attributes:
        system: name of the system.
        batch: batch size.
        first_ms: milliseconds to the first tokens, by round.
        step_ms: milliseconds per decode step, by round.
        host_us: host microseconds per decode step, by round, for systems that count them.
        padded_share: share of padding in the decode steps, for systems that count it.
        fallbacks: number of steps that ran eagerly, for systems that count them.
        failure: reason why there are no samples.
    """

    system: str
    batch: int
    first_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    host_us: list[float] = field(default_factory=list)
    padded_share: float | None = None
    fallbacks: int | None = None
    failure: str | None = None


def run(bench: BenchRun, names: list[str], settings: LatencySettings) -> None:
    """Run the command; ratios refer to the first system."""
    bench.reserve(settings.max_sequence_length(bench.roofline.max_num_batched_tokens))
    with start_workers(names, bench.config, bench.roofline, bench.options) as workers:
        measurements = measure(workers, names, settings, bench.roofline)
        details = workers.describe()
    rows = to_rows(measurements, settings, bench.roofline)
    bench.finish(
        CommandResult(
            command="latency",
            arguments={"systems": names, **asdict(settings)},
            rows=rows,
            columns=_columns(names[0]),
            plots=_plots(rows),
            details={"samples": [asdict(each) for each in measurements], **details},
        )
    )


def measure(
    workers: WorkerGroup, names: Sequence[str], settings: LatencySettings, roofline: Roofline
) -> list[Measurement]:
    """Measure each batch size on each system: a warm-up, then rounds in which they take turns."""
    measurements = []
    for batch in settings.batches:
        print(f"timing batch {batch} ...", file=sys.stderr)
        of_batch = [_warm_up(workers, name, batch, settings, roofline) for name in names]
        for round_number in range(1, settings.rounds + 1):
            for measurement in of_batch:
                if measurement.failure is None:
                    _sample(workers, measurement, settings, roofline, round_number)
        measurements += of_batch
    return measurements


def to_rows(
    measurements: Sequence[Measurement], settings: LatencySettings, roofline: Roofline
) -> list[dict[str, Any]]:
    """Return a row for each measurement; ratios refer to the first system at the same batch."""
    baselines = {each.batch: each for each in reversed(measurements)}
    rows = []
    for each in measurements:
        row: dict[str, Any] = {"system": each.system, "batch": each.batch, "failure": each.failure}
        if each.failure is None:
            base = baselines[each.batch]
            step, first = summarize(each.step_ms), summarize(each.first_ms)
            row |= {
                "step_ms": step.median,
                "step_spread": step.spread,
                "min_step_ms": roofline.min_step_ms(each.batch, settings.context),
                "tokens_per_second": each.batch / step.median * 1e3 if step.median > 0 else None,
                "first_token_ms": first.median,
                "first_spread": first.spread,
                "step_ratio": median_ratio(each.step_ms, base.step_ms),
                "first_ratio": median_ratio(each.first_ms, base.first_ms),
                "host_us": summarize(each.host_us).median if each.host_us else None,
                "padded_share": each.padded_share,
                "fallbacks": each.fallbacks,
            }
        rows.append(row)
    return rows


def _columns(baseline: str) -> list[Column]:
    return [
        Column("system", "system"),
        Column("batch", "batch"),
        *STEP_COLUMNS,
        BOUND_COLUMN,
        Column("tokens/s", "tokens_per_second", number(1)),
        Column(f"x {baseline}", "step_ratio", times),
        Column("ms to first tokens", "first_token_ms", number(2)),
        Column("spread", "first_spread", percent),
        Column(f"x {baseline}", "first_ratio", times),
        *HOST_COLUMNS,
        Column("eager steps", "fallbacks"),
    ]


def _plots(rows: list[dict[str, Any]]) -> list[Draw]:
    bound = [
        {**row, "system": "bandwidth bound", "step_ms": row["min_step_ms"]}
        for row in rows
        if row.get("min_step_ms") is not None
    ]
    axes: dict[str, Any] = {"x": "batch", "by": "system"}
    return [
        lines([*rows, *bound], y="step_ms", labels=("batch", "ms per step"), **axes),
        lines(rows, y="first_token_ms", labels=("batch", "ms to first tokens"), **axes),
    ]


def _warm_up(
    workers: WorkerGroup, name: str, batch: int, settings: LatencySettings, roofline: Roofline
) -> Measurement:
    """Return a measurement without samples, after the calls that compile or warm up the system."""
    measurement = Measurement(system=name, batch=batch)
    if name not in workers.clients:
        measurement.failure = workers.failures.get(name, "it did not start")
    elif batch > roofline.max_num_seqs:
        measurement.failure = f"limits.max_num_seqs is {roofline.max_num_seqs}"
    else:
        lead = settings.lead(batch, roofline.max_num_batched_tokens)
        for length in (lead + settings.steps, 1):
            _generate(workers, measurement, settings, roofline, length, seed=0)
    return measurement


def _sample(
    workers: WorkerGroup,
    measurement: Measurement,
    settings: LatencySettings,
    roofline: Roofline,
    round_number: int,
) -> None:
    """Add the sample of one round; prompts are the same for all systems, and new in each call."""
    lead = settings.lead(measurement.batch, roofline.max_num_batched_tokens)
    seed = 3 * round_number
    first = _generate(workers, measurement, settings, roofline, 1, seed=seed)
    short = _generate(workers, measurement, settings, roofline, lead, seed=seed + 1)
    length = lead + settings.steps
    long = _generate(workers, measurement, settings, roofline, length, seed=seed + 2)
    if first is None or short is None or long is None:
        return
    measurement.first_ms.append(first.seconds * 1e3)
    measurement.step_ms.append((long.seconds - short.seconds) / settings.steps * 1e3)
    if long.counters:
        _add_counters(measurement, short.counters, long.counters)
        fallbacks = sum(each.counters["fallbacks"] for each in (first, short, long))
        measurement.fallbacks = (measurement.fallbacks or 0) + int(fallbacks)


def _add_counters(
    measurement: Measurement, short: dict[str, float], long: dict[str, float]
) -> None:
    """Add the host time and padding of the steps by which two calls differ."""
    grown = {name: long[name] - short[name] for name in long}
    measurement.host_us.append(grown["host_seconds"] / max(1.0, grown["steps"]) * 1e6)
    computed = grown["computed"]
    measurement.padded_share = grown["padded"] / computed if computed > 0 else None


def _generate(
    workers: WorkerGroup,
    measurement: Measurement,
    settings: LatencySettings,
    roofline: Roofline,
    length: int,
    *,
    seed: int,
) -> GenerateResult | None:
    if measurement.failure is not None:
        return None
    batch = measurement.batch
    prompts = random_prompts(
        batch, settings.context, vocab_size=roofline.vocab_size, seed=1000 * batch + seed
    )
    result = workers.generate(measurement.system, prompts, [length] * batch, 0.0)
    if result is None:
        measurement.failure = workers.failures[measurement.system]
    return result
