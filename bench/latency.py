"""`bench latency`: milliseconds of a decode step and to the first token, over batch sizes, for every system in the same way.

The time to the first token is that of a call which generates one token for each of `batch` prompts. A decode step is the
difference of two calls, which generate `lead + steps` and `lead` tokens, divided by `steps`: `lead` is long enough that all
prompts have joined the batch before the first one leaves it, so both calls differ in full steps of `batch` rows alone.
"""

import sys
from dataclasses import asdict, dataclass
from typing import Any

from bench.roofline import Roofline
from bench.stats import figure, ratio
from bench.systems import Generated
from bench.worker_group import WorkerGroup
from bench.workloads import fresh_prompts

_LEAD = 4  # tokens in which a system gets over what only its first steps do


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is timed: batch sizes, prompt tokens of each sequence, decode steps of a sample, samples of each system."""

    batches: list[int]
    context: int
    steps: int
    rounds: int

    def longest(self, max_num_batched_tokens: int) -> int:
        """Tokens of the longest sequence."""
        return self.context + self.lead(max(self.batches), max_num_batched_tokens) + self.steps

    def lead(self, batch: int, max_num_batched_tokens: int) -> int:
        """Tokens after which all prompts of a batch have joined, at so many tokens a step."""
        return _LEAD + -(-batch * self.context // max_num_batched_tokens)


@dataclass(slots=True, kw_only=True)
class Cell:
    """One system at one batch size: its samples, round by round, or the reason why there are none.

    Attributes:
        first_ms, step_ms: of each round.
        host_us, padded_share: of the decode steps, for systems that count them.
        fallbacks: steps that ran eagerly, for systems that count them.
    """

    system: str
    batch: int
    first_ms: list[float]
    step_ms: list[float]
    host_us: list[float]
    padded_share: float | None = None
    fallbacks: int | None = None
    failure: str | None = None


def run(session: WorkerGroup, names: list[str], plan: Plan, card: Roofline) -> list[Cell]:
    """Every batch size on every system: warmed up, then in rounds, in each of which the systems take turns."""
    cells = []
    for batch in plan.batches:
        print(f"timing batch {batch} ...", file=sys.stderr)
        row = [_begin(session, name, batch, plan, card) for name in names]
        for number in range(1, plan.rounds + 1):
            for cell in row:
                if cell.failure is None:
                    _sample(session, cell, plan, card, number)
        cells += row
    return cells


def table(cells: list[Cell], plan: Plan, card: Roofline) -> list[dict[str, Any]]:
    """A row for each cell: medians, spreads, what reading alone would take, and ratios to the first system at the same batch."""
    rows = []
    for cell in cells:
        base = next(
            other
            for other in cells
            if other.batch == cell.batch and other.system == cells[0].system
        )
        row: dict[str, Any] = {"system": cell.system, "batch": cell.batch, "failure": cell.failure}
        if cell.failure is None:
            step, first = figure(cell.step_ms), figure(cell.first_ms)
            row |= {
                "step_ms": step.median,
                "step_spread": step.spread,
                "least_ms": card.least_ms(cell.batch, plan.context),
                "tokens_per_second": cell.batch / step.median * 1e3 if step.median > 0 else None,
                "first_token_ms": first.median,
                "first_spread": first.spread,
                "step_ratio": ratio(cell.step_ms, base.step_ms),
                "first_ratio": ratio(cell.first_ms, base.first_ms),
                "host_us": figure(cell.host_us).median if cell.host_us else None,
                "padded_share": cell.padded_share,
                "fallbacks": cell.fallbacks,
            }
        rows.append(row)
    return rows


def samples(cells: list[Cell]) -> list[dict[str, Any]]:
    """All that was measured."""
    return [asdict(cell) for cell in cells]


def _begin(session: WorkerGroup, name: str, batch: int, plan: Plan, card: Roofline) -> Cell:
    """An empty cell, its system warmed up for it."""
    cell = Cell(system=name, batch=batch, first_ms=[], step_ms=[], host_us=[])
    if name not in session.workers:
        cell.failure = session.failures.get(name, "it did not start")
    elif batch > card.max_num_seqs:
        cell.failure = f"limits.max_num_seqs is {card.max_num_seqs}"
    else:
        for length in (plan.lead(batch, card.max_num_batched_tokens) + plan.steps, 1):
            if cell.failure is None:
                _generate(session, cell, plan, card, length, seed=0)
    return cell


def _sample(session: WorkerGroup, cell: Cell, plan: Plan, card: Roofline, number: int) -> None:
    """One round of one cell; prompts are the same for all systems, and new in every call."""
    lead = plan.lead(cell.batch, card.max_num_batched_tokens)
    first = _generate(session, cell, plan, card, 1, seed=3 * number)
    short = _generate(session, cell, plan, card, lead, seed=3 * number + 1)
    long = _generate(session, cell, plan, card, lead + plan.steps, seed=3 * number + 2)
    if first is None or short is None or long is None:
        return
    cell.first_ms.append(first.seconds * 1e3)
    cell.step_ms.append((long.seconds - short.seconds) / plan.steps * 1e3)
    if long.counters:
        grown = {name: long.counters[name] - short.counters[name] for name in long.counters}
        cell.host_us.append(grown["host_seconds"] / max(1.0, grown["steps"]) * 1e6)
        cell.padded_share = grown["padded"] / grown["computed"] if grown["computed"] > 0 else None
        cell.fallbacks = (cell.fallbacks or 0) + int(
            sum(each.counters["fallbacks"] for each in (first, short, long))
        )


def _generate(
    session: WorkerGroup, cell: Cell, plan: Plan, card: Roofline, length: int, *, seed: int
) -> Generated | None:
    if cell.failure is not None:
        return None
    prompts = fresh_prompts(
        cell.batch, plan.context, vocab_size=card.vocab_size, seed=1000 * cell.batch + seed
    )
    generated = session.generate(cell.system, prompts, [length] * cell.batch, 0.0)
    if generated is None:
        cell.failure = session.failures[cell.system]
    return generated
