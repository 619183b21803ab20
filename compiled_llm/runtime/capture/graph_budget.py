"""Which buckets are recorded when recordings may take only so much memory: the most useful ones.

A bucket is as useful as the padding that it saves, given those that are recorded already: first come the buckets that hold
everything, one of each kind, and then, again and again, the one that saves the largest share of its kind's work. The work of a
step is taken to be its padded size, and a tenth more for each sampler that is dearer than the one before; the steps are those
that were seen, or, where none were, one of each size with each sampler.

What a recording takes is known when it is made. One that turns out to go beyond the budget is given back, and others of its kind,
which take as much, are not tried.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from compiled_llm.runtime.bucket_tuning import Traffic
from compiled_llm.runtime.buckets import SAMPLERS, Bucket, BucketKind

Work = NDArray[np.float64]


def order_by_usefulness(buckets: Sequence[Bucket], traffic: Mapping[str, Traffic]) -> list[Bucket]:
    """The buckets, the most useful first."""
    holding_all: list[Bucket] = []
    ranked: list[tuple[float, Bucket]] = []
    for kind in dict.fromkeys(bucket.kind for bucket in buckets):
        first, *others = _ranked(
            [bucket for bucket in buckets if bucket.kind == kind], traffic.get(kind)
        )
        holding_all.append(first[1])
        ranked.extend(others)
    holding_all.sort(key=lambda bucket: bucket.cost, reverse=True)
    return [
        *holding_all,
        *(bucket for _, bucket in sorted(ranked, key=lambda pair: pair[0], reverse=True)),
    ]


class GraphBudget:
    """Keeps recordings within a budget.

    Args:
        limit: bytes, or None for no limit.
        held: gives the bytes that all recordings of this thread take now.
    """

    def __init__(self, limit: int | None, held: Callable[[], int]) -> None:
        self._limit, self._held, self._before = limit, held, held()
        self._typical: dict[
            BucketKind, int
        ] = {}  # of the last recording of the kind that was not its first
        self._seen: set[BucketKind] = set()

    @property
    def used(self) -> int:
        """Bytes that recordings have taken since this was made."""
        return self._held() - self._before

    def refusal(self, bucket: Bucket) -> str | None:
        """Why there is no room for a bucket that is not recorded yet; None where there may be."""
        expected = self._typical.get(bucket.kind, 0)
        if self._limit is None or self.used + expected <= self._limit:
            return None
        return f"{self._text()} and it would take about {_mib(expected)} more"

    def measure(self, bucket: Bucket, taken: int) -> str | None:
        """Take note of what a new recording takes; why it is too much, or None."""
        if bucket.kind in self._seen:  # the first one brings the memory that all of them work in
            self._typical[bucket.kind] = taken
        self._seen.add(bucket.kind)
        return (
            f"{self._text()} with its {_mib(taken)}"
            if self._limit is not None and self.used > self._limit
            else None
        )

    def _text(self) -> str:
        assert self._limit is not None
        return f"graphs take {_mib(self.used)} of memory.graphs={_mib(self._limit)}"


def _ranked(buckets: Sequence[Bucket], seen: Traffic | None) -> list[tuple[float, Bucket]]:
    """Buckets of one kind, the one that holds all first, each with the share of the work that it saves."""
    steps = _steps(buckets, seen)
    first = max(buckets, key=lambda bucket: (SAMPLERS.index(bucket.sampler), bucket.size))
    work = np.full_like(steps, _work(first))
    total = max(float((work * steps).sum()), 1e-30)
    ranked, left = [(1.0, first)], [bucket for bucket in buckets if bucket != first]
    while left:
        saved = [float(((work - _with(bucket, work)) * steps).sum()) for bucket in left]
        best = left.pop(int(np.argmax(saved)))
        ranked.append((max(saved) / total, best))
        work = _with(best, work)
    return ranked


def _steps(buckets: Sequence[Bucket], seen: Traffic | None) -> Work:
    """How many steps of each size, from 1, come with each sampler, [sizes, samplers]."""
    samplers = sorted({SAMPLERS.index(bucket.sampler) for bucket in buckets})
    largest = max(bucket.size for bucket in buckets)
    steps = np.zeros((largest, len(SAMPLERS)))
    steps[:, samplers] = 1
    if seen is not None and seen.seen:
        counts = np.array([seen.seen[size] for size in range(1, largest + 1)])
        steps *= counts[:, None]
    return steps


def _work(bucket: Bucket) -> float:
    return bucket.size * (1 + SAMPLERS.index(bucket.sampler) / 10)


def _with(bucket: Bucket, work: Work) -> Work:
    """The work of each step when it may also run in this bucket."""
    better = work.copy()
    served = better[: bucket.size, : SAMPLERS.index(bucket.sampler) + 1]
    np.minimum(served, _work(bucket), out=served)
    return better


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
