"""`bench throughput`: output tokens a second of a whole workload, all prompts submitted at once, for every system."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.roofline import Roofline
from bench.sharegpt import read_lengths, token_counter
from bench.stats import figure, ratio
from bench.systems import Generated
from bench.worker_group import WorkerGroup
from bench.workloads import Workload, of_lengths, offline
from compiled_llm.config.schema import Config

_WARM_UP = 16  # tokens of each output when warming up


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Which workload: lengths from a ShareGPT-style file, or random ones between two ends; W1 by default."""

    prompts: int = 256
    prompt_lengths: tuple[int, int] = (100, 1024)
    output_lengths: tuple[int, int] = (100, 1024)
    temperature: float = 0.6
    sharegpt: Path | None = None

    def workload(self, config: Config, card: Roofline) -> Workload:
        """Its prompts; raises ValueError where the file cannot be used."""
        if self.sharegpt is None:
            lengths = {"prompt_lengths": self.prompt_lengths, "output_lengths": self.output_lengths}
            return offline(
                self.prompts, temperature=self.temperature, vocab_size=card.vocab_size, **lengths
            )
        count, words = token_counter(config.model.name)
        print(f"lengths of {self.sharegpt} are counted in {words}", file=sys.stderr)
        found = read_lengths(self.sharegpt, count, limit=self.prompts, longest=card.max_model_len)
        return of_lengths(found, temperature=self.temperature, vocab_size=card.vocab_size)


@dataclass(slots=True, kw_only=True)
class Run:
    """One system: seconds and counters of each round, or the reason why there are none."""

    system: str
    rounds: list[Generated]
    failure: str | None = None


def run(session: WorkerGroup, names: list[str], workload: Workload, *, rounds: int) -> list[Run]:
    """Every system warmed up, then rounds in which they take turns."""
    runs = [Run(system=name, rounds=[]) for name in names]
    warm_up = replace(workload, output_lengths=[min(_WARM_UP, n) for n in workload.output_lengths])
    for number in range(rounds + 1):
        print(f"round {number} of {rounds} ..." if number else "warming up ...", file=sys.stderr)
        for each in runs:
            generated = _generate(session, each, workload if number else warm_up)
            if number and generated is not None:
                each.rounds.append(generated)
    return runs


def table(session: WorkerGroup, runs: list[Run], workload: Workload) -> list[dict[str, Any]]:
    """A row for each system; ratios are of tokens a second, against the first one."""
    rows = []
    for each in runs:
        row: dict[str, Any] = {"system": each.system, "failure": each.failure}
        if each.rounds:
            seconds = figure([generated.seconds for generated in each.rounds])
            row |= {
                "tokens_per_second": workload.num_output_tokens / seconds.median,
                "seconds": seconds.median,
                "spread": seconds.spread,
                "ratio": ratio(
                    [g.seconds for g in runs[0].rounds], [g.seconds for g in each.rounds]
                ),
                "ready_s": session.ready_seconds.get(each.system),
                **_rates(each.rounds),
            }
        rows.append(row)
    return rows


def _generate(session: WorkerGroup, each: Run, workload: Workload) -> Generated | None:
    if each.failure is None and each.system not in session.workers:
        each.failure = session.failures.get(each.system, "it did not start")
    if each.failure is not None:
        return None
    generated = session.generate(
        each.system, workload.prompts, workload.output_lengths, workload.temperature
    )
    if generated is None:
        each.failure = session.failures[each.system]
    return generated


def _rates(rounds: list[Generated]) -> dict[str, float]:
    """Of the systems that count: host time of a step, padding, and what went wrong, over all rounds."""
    if not rounds[0].counters:
        return {}
    total = {
        name: sum(generated.counters[name] for generated in rounds) for name in rounds[0].counters
    }
    return {
        "steps": total["steps"] / len(rounds),
        "host_us": total["host_seconds"] / max(1, total["steps"]) * 1e6,
        "padded_share": total["padded"] / max(1, total["computed"]),
        "preemptions": total["preemptions"],
        "fallbacks": total["fallbacks"],
    }
