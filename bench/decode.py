"""Timing of decode steps in our engine, as `buckets`, `passes` and `stream` need it."""

from dataclasses import asdict, dataclass
from typing import Any

from bench.worker_group import WorkerGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSettings:
    """How decode steps are timed.

    Attributes:
        context: number of prompt tokens of each sequence.
        steps: number of decode steps in a round.
        rounds: number of rounds, each of which gives a sample.
    """

    context: int
    steps: int
    rounds: int

    def max_sequence_length(self, max_batch: int, max_num_batched_tokens: int) -> int:
        """Return the tokens of a sequence that decodes in all rounds and while others prefill."""
        prefill_steps = -(-max_batch * self.context // max_num_batched_tokens)
        return self.context + 2 + self.steps * (self.rounds + 2) + prefill_steps


def time_decode(
    workers: WorkerGroup, name: str, batch: int, settings: DecodeSettings, vocab_size: int
) -> dict[str, Any] | None:
    """Return the result of `OursStepped.decode` in a system, or None if the system has failed."""
    if name not in workers.clients:
        return None
    measured: dict[str, Any] | None = workers.call(
        name, "decode", batch=batch, vocab_size=vocab_size, **asdict(settings)
    )
    return measured
