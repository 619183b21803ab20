"""Decides which pending buckets are built between steps, and when.

With `compile.capture: lazy` a bucket is built once steps have needed it; until then a larger bucket
or eager serves them. Building a bucket pauses the requests that run, so steps then get at least as
much time before the next one. An idle engine need not wait.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from compiled_llm.report.report import BucketReport, BucketState
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.capture.captured_bucket import CapturedBucket
from compiled_llm.runtime.step.buffers import StepBuffers
from compiled_llm.system.compiler_lock import compiler_is_free

_PATIENCE = 5.0  # seconds
# The buffers that a step of padding writes, besides the trash row and outputs that were read.
_WRITTEN = ("decode_inputs", "prefill_inputs", "step")


class LazyBuckets:
    """Counts the demand for pending buckets and builds the most needed one.

    Args:
        build: compiles and captures a bucket, which may take minutes.
        clock: returns seconds.
    """

    def __init__(
        self,
        build: Callable[[Bucket], CapturedBucket],
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._build = build
        self._clock = clock
        self._demand: Counter[Bucket] = Counter()
        self._not_before = clock()
        self._demanded_at = self._not_before

    @property
    def has_demand(self) -> bool:
        """Whether a step has needed a bucket that is still pending."""
        return bool(self._demand)

    @property
    def is_due(self) -> bool:
        """Whether a bucket may be built now.

        There is demand, steps had as much time as the last bucket took, and no other engine
        compiles.
        """
        return bool(self._demand) and self._clock() >= self._not_before and compiler_is_free()

    @property
    def is_overdue(self) -> bool:
        """Whether a bucket is due and prompts have deferred it for longer than a few seconds."""
        return self.is_due and self._clock() >= max(self._not_before, self._demanded_at) + _PATIENCE

    def record_demand(self, bucket: Bucket) -> None:
        """Count a step that needed this bucket."""
        if not self._demand:
            self._demanded_at = self._clock()
        self._demand[bucket] += 1

    def build_next(self) -> CapturedBucket:
        """Build the bucket in most demand, the larger of two with equal demand."""
        bucket = max(self._demand, key=lambda bucket: (self._demand[bucket], bucket.cost))
        del self._demand[bucket]  # even if it fails: it is not tried again
        began = self._clock()
        built = self._build(bucket)
        ended = self._clock()
        self._not_before = ended + (ended - began)
        return built


def pending_buckets(buckets: Iterable[Bucket]) -> list[CapturedBucket]:
    """Return the buckets as pending: a step that needs one records demand for it."""
    return [
        CapturedBucket(
            bucket=bucket,
            report=BucketReport(
                bucket=str(bucket),
                size=bucket.size,
                state=BucketState.PENDING,
                failure="compile.capture is lazy",
            ),
        )
        for bucket in buckets
    ]


@contextmanager
def preserve_step_inputs(state: StepBuffers) -> Iterator[None]:
    """Restore what a capture overwrites, so that the next step finds its inputs.

    The outputs of all launched steps must have been read before.
    """
    before = {name: state.get_buffer(name).clone() for name in _WRITTEN}
    try:
        yield
    finally:
        for name, content in before.items():
            state.get_buffer(name).copy_(content)
