"""Buckets that are compiled and captured when steps have asked for them, between steps, the busiest first.

Until then the next larger bucket that is ready serves, or eager, counted by reason like any other stand-in. A bucket costs the
requests that run meanwhile a pause, so at least as much time goes to steps before the next one; an engine that has nothing else
to do need not wait.
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
# What a step of padding alone writes, besides the trash row's state and what steps already read have sampled.
_WRITTEN = ("decode_inputs", "prefill_inputs", "step")


class LazyBuckets:
    """Which bucket comes next, and when.

    Args:
        make: compiles and captures one bucket; it may take long.
        clock: seconds.
    """

    def __init__(
        self,
        make: Callable[[Bucket], CapturedBucket],
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._make, self._clock = make, clock
        self._demand: Counter[Bucket] = Counter()
        self._not_before = self._demanded_at = clock()

    @property
    def has_demand(self) -> bool:
        """Whether a step has asked for a bucket that is not ready."""
        return bool(self._demand)

    @property
    def is_due(self) -> bool:
        """Whether one is wanted, steps had as much time as the last one took, and no other engine compiles now."""
        return bool(self._demand) and self._clock() >= self._not_before and compiler_is_free()

    @property
    def is_overdue(self) -> bool:
        """Whether one is due and was put off, because prompts came first, for longer than they may ask for."""
        return self.is_due and self._clock() >= max(self._not_before, self._demanded_at) + _PATIENCE

    def record_demand(self, bucket: Bucket) -> None:
        """A step would have liked to have it."""
        if not self._demand:
            self._demanded_at = self._clock()
        self._demand[bucket] += 1

    def capture_next(self) -> CapturedBucket:
        """Make the one that most steps have asked for; the larger of two alike."""
        bucket = max(self._demand, key=lambda bucket: (self._demand[bucket], bucket.cost))
        del self._demand[bucket]  # also if it fails: it is not tried again
        began = self._clock()
        entry = self._make(bucket)
        ended = self._clock()
        self._not_before = ended + (ended - began)
        return entry


def pending(buckets: Iterable[Bucket]) -> list[CapturedBucket]:
    """Entries of buckets that nobody has asked for yet."""
    reason = "compile.capture is lazy"
    reports = (
        (
            bucket,
            BucketReport(
                bucket=str(bucket), size=bucket.size, state=BucketState.PENDING, failure=reason
            ),
        )
        for bucket in buckets
    )
    return [CapturedBucket(bucket=bucket, report=report) for bucket, report in reports]


@contextmanager
def preserve_step_inputs(state: StepBuffers) -> Iterator[None]:
    """Afterwards the next step finds what it would have found; all steps before must have been read."""
    before = {name: state.get_buffer(name).clone() for name in _WRITTEN}
    try:
        yield
    finally:
        for name, content in before.items():
            state.get_buffer(name).copy_(content)
