"""Limits of a step, and the number of prompt tokens in it."""

from collections.abc import Sequence
from dataclasses import dataclass

from compiled_llm.engine.model_runner_protocol import ModelRunnerProtocol


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Limits of a step.

    Attributes:
        max_num_batched_tokens: tokens of a step at most.
        prefill_sizes: sizes of the prefill buckets.
        separate_decode: whether steps without prompts are decode batches.
        one_sequence_prefill: whether a step with prompt tokens serves a single sequence.
    """

    max_num_batched_tokens: int
    prefill_sizes: Sequence[int]
    separate_decode: bool
    one_sequence_prefill: bool = False

    @classmethod
    def of(cls, model_runner: ModelRunnerProtocol) -> "SchedulerLimits":
        """Return the limits of a model runner."""
        return cls(
            max_num_batched_tokens=model_runner.limits.max_num_batched_tokens,
            prefill_sizes=model_runner.prefill_sizes,
            separate_decode=model_runner.separate_decode,
            one_sequence_prefill=model_runner.has_states,
        )

    def prefill_budget(self, num_pending: int, num_decoding: int) -> int:
        """Return how many tokens of prompts the next step may compute.

        These are all of `max_num_batched_tokens` that the decoding rows leave, or fewer if the step
        would exceed the size of a bucket by a little. Exceeding it is worthwhile if the next bucket
        pads less than the smaller one would put off, or if it is no larger than all steps of the
        smaller one together, which are many if the decoding rows leave little of it.

        Args:
            num_pending: tokens that could be computed now, including one for each decoding row.
            num_decoding: rows that decode in this step.
        """
        limit, sizes = self.max_num_batched_tokens, self.prefill_sizes
        pending = min(num_pending, limit)
        smaller = max((size for size in sizes if size <= pending), default=0)
        larger = min((size for size in sizes if size >= pending), default=pending)
        within = smaller - num_decoding
        exceed = (
            within <= 0
            or pending - smaller >= larger - pending
            or -(-(pending - num_decoding) // within) * smaller > larger
        )
        return limit - num_decoding if exceed else within
