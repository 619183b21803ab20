"""`bench throughput`: output tokens per second, with all prompts submitted at once."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.display import Column, number, percent, times
from bench.figures import bars
from bench.roofline import Roofline
from bench.run import BenchRun, CommandResult
from bench.sharegpt import read_lengths, token_counter
from bench.stats import median_ratio, summarize
from bench.systems import GenerateResult
from bench.trace import idle_between_launches
from bench.worker_group import WorkerGroup, start_workers
from bench.workloads import Workload, offline_workload, workload_of_lengths
from compiled_llm.config.schema import Config

_WARM_UP_TOKENS = 16  # of each output in the warm-up


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSettings:
    """Which workload to run; see `offline_workload` for the defaults.

    Attributes:
        prompts: number of prompts; a maximum with `sharegpt`.
        prompt_lengths: smallest and largest number of tokens of a prompt.
        output_lengths: smallest and largest number of tokens of an output.
        temperature: sampling temperature; 0 is greedy.
        sharegpt: file of conversations that replaces the ranges of lengths.
    """

    prompts: int = 256
    prompt_lengths: tuple[int, int] = (100, 1024)
    output_lengths: tuple[int, int] = (100, 1024)
    temperature: float = 0.6
    sharegpt: Path | None = None

    def workload(self, config: Config, roofline: Roofline) -> Workload:
        """Return the workload.

        Raises:
            ValueError: the file of conversations cannot be used.
        """
        vocab_size = roofline.vocab_size
        if self.sharegpt is None:
            return offline_workload(
                self.prompts,
                prompt_lengths=self.prompt_lengths,
                output_lengths=self.output_lengths,
                temperature=self.temperature,
                vocab_size=vocab_size,
            )
        count, unit = token_counter(config.model.name)
        print(f"lengths of {self.sharegpt} are counted in {unit}", file=sys.stderr)
        lengths = read_lengths(
            self.sharegpt, count, limit=self.prompts, max_length=roofline.max_model_len
        )
        return workload_of_lengths(lengths, temperature=self.temperature, vocab_size=vocab_size)


@dataclass(slots=True, kw_only=True)
class SystemRounds:
    """Results of one system, by round, or the reason why there are none."""

    system: str
    rounds: list[GenerateResult] = field(default_factory=list)
    failure: str | None = None


def run(
    bench: BenchRun,
    names: list[str],
    settings: WorkloadSettings,
    *,
    rounds: int,
    profile_steps: int,
) -> None:
    """Run the command; ratios refer to the first system.

    Args:
        bench: the run.
        names: systems.
        settings: the workload.
        rounds: number of rounds after the warm-up.
        profile_steps: steps of our engines to profile for the GPU's idle share; 0 skips this.
    """
    workload = settings.workload(bench.config, bench.roofline)
    bench.reserve(workload.max_sequence_length)
    with start_workers(names, bench.config, bench.roofline, bench.options) as workers:
        results = measure(workers, names, workload, rounds=rounds)
        rows = to_rows(workers, results, workload)
        for row in rows if profile_steps else []:
            row |= _idle_shares(workers, row["system"], workload, profile_steps)
        details = workers.describe()
    sharegpt = str(settings.sharegpt) if settings.sharegpt else None
    bench.finish(
        CommandResult(
            command="throughput",
            arguments={
                "systems": names,
                "rounds": rounds,
                **asdict(settings),
                "sharegpt": sharegpt,
            },
            rows=rows,
            columns=_columns(names[0]),
            plots=[bars(rows, x="system", ys=["tokens_per_second"], label="output tokens/s")],
            details={
                "samples": [_samples(each) for each in results],
                "prompt_tokens": workload.num_prompt_tokens,
                "output_tokens": workload.num_output_tokens,
                **details,
            },
        )
    )


def measure(
    workers: WorkerGroup, names: Sequence[str], workload: Workload, *, rounds: int
) -> list[SystemRounds]:
    """Warm up all systems, then run rounds in which they take turns."""
    results = [SystemRounds(system=name) for name in names]
    short = [min(_WARM_UP_TOKENS, length) for length in workload.output_lengths]
    warm_up = replace(workload, output_lengths=short)
    print("warming up ...", file=sys.stderr)
    for each in results:
        _generate(workers, each, warm_up)
    for round_number in range(1, rounds + 1):
        print(f"round {round_number} of {rounds} ...", file=sys.stderr)
        for each in results:
            result = _generate(workers, each, workload)
            if result is not None:
                each.rounds.append(result)
    return results


def to_rows(
    workers: WorkerGroup, results: Sequence[SystemRounds], workload: Workload
) -> list[dict[str, Any]]:
    """Return a row for each system; a ratio is that of tokens per second to the first system."""
    base = [result.seconds for result in results[0].rounds]
    rows = []
    for each in results:
        row: dict[str, Any] = {"system": each.system, "failure": each.failure}
        if each.rounds:
            samples = [result.seconds for result in each.rounds]
            seconds = summarize(samples)
            row |= {
                "tokens_per_second": workload.num_output_tokens / seconds.median,
                "seconds": seconds.median,
                "spread": seconds.spread,
                "ratio": median_ratio(base, samples),
                "ready_s": workers.ready_seconds.get(each.system),
                **_rates(each.rounds),
            }
        rows.append(row)
    return rows


def _columns(baseline: str) -> list[Column]:
    return [
        Column("system", "system"),
        Column("output tokens/s", "tokens_per_second", number(1)),
        Column(f"x {baseline}", "ratio", times),
        Column("seconds", "seconds", number(3)),
        Column("spread", "spread", percent),
        Column("steps", "steps", number(0)),
        Column("host us per step", "host_us", number(1)),
        Column("padding", "padded_share", percent),
        Column("idle, decode", "idle_decode", percent),
        Column("idle, prefill", "idle_prefill", percent),
        Column("preemptions", "preemptions", number(0)),
        Column("eager steps", "fallbacks", number(0)),
        Column("s to ready", "ready_s", number(1)),
    ]


def _samples(each: SystemRounds) -> dict[str, Any]:
    """Return a system's entry in the record, without the lengths of the outputs."""
    rounds = [{**asdict(result), "counts": None} for result in each.rounds]
    return {"system": each.system, "rounds": rounds}


def _generate(
    workers: WorkerGroup, each: SystemRounds, workload: Workload
) -> GenerateResult | None:
    name = each.system
    if each.failure is None and name not in workers.clients:
        each.failure = workers.failures.get(name, "it did not start")
    if each.failure is not None:
        return None
    result = workers.generate(name, workload.prompts, workload.output_lengths, workload.temperature)
    if result is None:
        each.failure = workers.failures[name]
    return result


def _rates(rounds: Sequence[GenerateResult]) -> dict[str, float]:
    """Return rates from the counters of all rounds; nothing for systems without counters."""
    if not rounds[0].counters:
        return {}
    total = {name: sum(result.counters[name] for result in rounds) for name in rounds[0].counters}
    return {
        "steps": total["steps"] / len(rounds),
        "host_us": total["host_seconds"] / max(1, total["steps"]) * 1e6,
        "padded_share": total["padded"] / max(1, total["computed"]),
        "preemptions": total["preemptions"],
        "fallbacks": total["fallbacks"],
    }


def _idle_shares(
    workers: WorkerGroup, name: str, workload: Workload, steps: int
) -> dict[str, float | None]:
    """Return the GPU's idle share between launches, for systems of ours."""
    if not name.startswith("ours") or name not in workers.clients:
        return {}
    profiles = workers.call(name, "profile_workload", steps=steps, **asdict(workload)) or {}
    return {f"idle_{kind}": idle_between_launches(spans) for kind, spans in profiles.items()}
