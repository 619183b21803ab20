"""Chooses which buckets are captured when `memory.graphs` limits the memory of CUDA graphs.

The most useful ones are. The usefulness of a bucket is the padding that it saves, given the buckets
chosen before it: first comes the bucket of each kind that holds all batches, and then, repeatedly,
the one that saves the largest share of its kind's work. The work of a step is its padded size, plus
a tenth for each sampler that is cheaper than its own. The steps are those seen by earlier runs, or
else one of each size with each sampler.

The memory of a recording is known once it is made. A recording that exceeds the budget is released,
and further buckets of its kind, which take as much, are not tried.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from compiled_llm.runtime.bucket_tuning import Traffic
from compiled_llm.runtime.buckets import SAMPLERS, Bucket, BucketKind

Work = NDArray[np.float64]


def order_by_usefulness(buckets: Sequence[Bucket], traffic: Mapping[str, Traffic]) -> list[Bucket]:
    """Return the buckets, the most useful first.

    Args:
        buckets: of any kinds.
        traffic: steps seen, by kind.
    """
    largest: list[Bucket] = []
    ranked: list[tuple[float, Bucket]] = []
    for kind in dict.fromkeys(bucket.kind for bucket in buckets):
        of_kind = [bucket for bucket in buckets if bucket.kind == kind]
        first, *others = _rank(of_kind, traffic.get(kind))
        largest.append(first[1])
        ranked.extend(others)
    largest.sort(key=lambda bucket: bucket.cost, reverse=True)
    ranked.sort(key=lambda pair: pair[0], reverse=True)
    return [*largest, *(bucket for _, bucket in ranked)]


class GraphBudget:
    """Keeps the memory of CUDA graphs within a budget.

    Args:
        limit: bytes, or None for no limit.
        graph_bytes: returns the bytes that all graphs of this thread take now.
    """

    def __init__(self, limit: int | None, graph_bytes: Callable[[], int]) -> None:
        self._limit = limit
        self._graph_bytes = graph_bytes
        self._bytes_before = graph_bytes()
        # Bytes of the last recording of a kind that was not its first.
        self._typical: dict[BucketKind, int] = {}
        self._captured_kinds: set[BucketKind] = set()

    @property
    def used(self) -> int:
        """Bytes that graphs have taken since the budget was created."""
        return self._graph_bytes() - self._bytes_before

    def refusal(self, bucket: Bucket) -> str | None:
        """Return why the bucket is not to be captured, or None if it may fit."""
        expected = self._typical.get(bucket.kind, 0)
        if self._limit is None or self.used + expected <= self._limit:
            return None
        return f"{self._usage()} and it would take about {_mib(expected)} more"

    def record_capture(self, bucket: Bucket, taken: int) -> str | None:
        """Record the bytes of a new recording; return the reason if it exceeds the budget."""
        # The first recording of a kind also allocates the memory that all of them share.
        if bucket.kind in self._captured_kinds:
            self._typical[bucket.kind] = taken
        self._captured_kinds.add(bucket.kind)
        if self._limit is None or self.used <= self._limit:
            return None
        return f"{self._usage()} with its {_mib(taken)}"

    def _usage(self) -> str:
        assert self._limit is not None
        return f"graphs take {_mib(self.used)} of memory.graphs={_mib(self._limit)}"


def _rank(buckets: Sequence[Bucket], traffic: Traffic | None) -> list[tuple[float, Bucket]]:
    """Return buckets of one kind with the share of work that each saves.

    The first is the one that holds all batches.
    """
    steps = _count_steps(buckets, traffic)
    first = max(buckets, key=lambda bucket: (SAMPLERS.index(bucket.sampler), bucket.size))
    work = np.full_like(steps, _work(first))
    total = max(float((work * steps).sum()), 1e-30)
    ranked, left = [(1.0, first)], [bucket for bucket in buckets if bucket != first]
    while left:
        saved = [float(((work - _work_with(bucket, work)) * steps).sum()) for bucket in left]
        best = left.pop(int(np.argmax(saved)))
        ranked.append((max(saved) / total, best))
        work = _work_with(best, work)
    return ranked


def _count_steps(buckets: Sequence[Bucket], traffic: Traffic | None) -> Work:
    """Return how many steps of each size (from 1) come with each sampler, [sizes, samplers]."""
    samplers = sorted({SAMPLERS.index(bucket.sampler) for bucket in buckets})
    largest = max(bucket.size for bucket in buckets)
    steps = np.zeros((largest, len(SAMPLERS)))
    steps[:, samplers] = 1
    if traffic is not None and traffic.seen:
        counts = np.array([traffic.seen[size] for size in range(1, largest + 1)])
        steps *= counts[:, None]
    return steps


def _work(bucket: Bucket) -> float:
    return bucket.size * (1 + SAMPLERS.index(bucket.sampler) / 10)


def _work_with(bucket: Bucket, work: Work) -> Work:
    """Return the work of each step if it may also run in this bucket, [sizes, samplers]."""
    better = work.copy()
    served = better[: bucket.size, : SAMPLERS.index(bucket.sampler) + 1]
    np.minimum(served, _work(bucket), out=served)
    return better


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
