"""Which bucket serves a step: the cheapest that holds it; where that cannot be used, the cheapest that can; else none, and eager.

Nothing of this is silent: steps served by a bucket in another's stead are counted by the reason, and so are eager ones.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from compiled_llm.config.schema import Sampler
from compiled_llm.errors import StrictError
from compiled_llm.report.report import BucketState, Report
from compiled_llm.runtime.buckets import Bucket, BucketKind, smallest_bucket
from compiled_llm.runtime.capture.captured_bucket import CapturedBucket


class BucketSelector:
    """Finds the buckets of an engine.

    Args:
        buckets: of each kind, cheap to dear.
        entries: of all of them, or None where the config wants nothing compiled.
        report: where steps are counted.
        strict: a step that would run eagerly is an error.
        on_demand: told of pending buckets that would serve a step best.
    """

    def __init__(
        self, buckets: Mapping[BucketKind, Sequence[Bucket]], entries: Iterable[CapturedBucket] | None, report: Report, *, strict: bool,
        on_demand: Callable[[Bucket], None] = lambda bucket: None,
    ) -> None:  # fmt: skip
        self._buckets, self._report, self._strict, self._record_demand = (
            buckets,
            report,
            strict,
            on_demand,
        )
        self._compiles, self.captured_buckets = (
            entries is not None,
            {entry.bucket: entry for entry in entries or ()},
        )
        self._exact: dict[tuple[BucketKind, int, Sampler], CapturedBucket] = {}

    def select(self, kind: BucketKind, size: int, sampler: Sampler) -> CapturedBucket | None:
        """The entry that serves a batch, or None; counted, unless it is the one that fits best. Raises StrictError."""
        entry = self._exact.get((kind, size, sampler))
        if entry is not None:
            return entry
        wanted = smallest_bucket(self._buckets[kind], size, sampler) if self._compiles else None
        if wanted is None:
            if self._compiles:
                self._count_eager(f"no {kind} bucket holds {size} with the {sampler} sampler")
            else:
                self._count_eager("compile.dispatch is eager", expected=True)
            return None
        best = smallest_bucket(
            [b for b in self._buckets[kind] if self._is_for_use(b)], size, sampler
        )
        if best is not None and self.captured_buckets[best].compiled is None:
            self._record_demand(best)
        served = smallest_bucket(
            [b for b in self._buckets[kind] if self.captured_buckets[b].compiled is not None],
            size,
            sampler,
        )
        if served is None:
            pending = self.captured_buckets[wanted].report.state is BucketState.PENDING
            self._count_eager(self._why_not(wanted), expected=pending)
            return None
        if served == wanted:
            self._exact[kind, size, sampler] = self.captured_buckets[served]
        else:
            self._report.counters.count_stand_in(f"{self._why_not(wanted)}; {served} served")
        return self.captured_buckets[served]

    def check_sampler(self, kind: BucketKind, sampler: Sampler) -> None:
        """Raise a ValueError if no bucket of this kind serves the sampler, so that `strict` would forbid the steps."""
        usable = [bucket for bucket in self._buckets[kind] if self._is_for_use(bucket)]
        if smallest_bucket(usable, 1, sampler) is None:
            raise ValueError(
                f"strict forbids steps without a bucket, and no {kind} bucket serves the {sampler} sampler, which the request "
                f"needs: add {sampler} to buckets.samplers, or set strict=false"
            )

    def usable_sizes(self, kind: BucketKind) -> list[int]:
        """Sizes of buckets that can be used, now or once a step has asked, small to large; of all, where nothing is compiled."""
        return sorted(
            {
                bucket.size
                for bucket in self._buckets[kind]
                if not self._compiles or self._is_for_use(bucket)
            }
        )

    def replace(self, entry: CapturedBucket) -> None:
        """Take an entry for the one that its bucket had, which served no step; also in the report."""
        old = self.captured_buckets[entry.bucket].report
        self.captured_buckets[entry.bucket] = entry
        self._report.buckets = [
            entry.report if report is old else report for report in self._report.buckets
        ]
        self._exact.clear()

    def _is_for_use(self, bucket: Bucket) -> bool:
        entry = self.captured_buckets[bucket]
        return entry.compiled is not None or entry.report.state is BucketState.PENDING

    def _count_eager(self, reason: str, *, expected: bool = False) -> None:
        self._report.counters.count_fallback(reason, expected=expected)
        if self._strict:
            raise StrictError(f"a step would run eagerly: {reason}")

    def _why_not(self, bucket: Bucket) -> str:
        report = self.captured_buckets[bucket].report
        what = {
            BucketState.LEFT_OUT: "was left out",
            BucketState.PENDING: "is not captured yet",
        }.get(report.state, "failed")
        return f"{bucket} {what}: {report.failure}"
