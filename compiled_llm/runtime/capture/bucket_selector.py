"""Chooses the bucket for a batch: the smallest one that holds it and is usable.

If the smallest one is not usable, a larger one serves instead; if none is, the step runs eagerly.
Both are counted by their reasons in the report.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from compiled_llm.config.schema import Sampler
from compiled_llm.errors import StrictError
from compiled_llm.report.report import BucketState, Report
from compiled_llm.runtime.buckets import Bucket, BucketKind, smallest_bucket
from compiled_llm.runtime.capture.captured_bucket import CapturedBucket


class BucketSelector:
    """Selects among the buckets of an engine.

    Args:
        buckets: of each kind, ordered cheap to expensive.
        captured: all of them, or None with `compile.dispatch: eager`.
        report: counts fallbacks to eager and to larger buckets.
        strict: whether a step that would run eagerly is an error.
        on_demand: called with the pending bucket that a step needs.

    Attributes:
        captured_buckets: by bucket, whether usable or not.
    """

    def __init__(
        self,
        buckets: Mapping[BucketKind, Sequence[Bucket]],
        captured: Iterable[CapturedBucket] | None,
        report: Report,
        *,
        strict: bool,
        on_demand: Callable[[Bucket], None] = lambda bucket: None,
    ) -> None:
        self.captured_buckets = {entry.bucket: entry for entry in captured or ()}
        self._buckets = buckets
        self._compiles = captured is not None
        self._report = report
        self._strict = strict
        self._record_demand = on_demand
        # Batches that their smallest bucket serves: these need no search and are not counted.
        self._exact: dict[tuple[BucketKind, int, Sampler], CapturedBucket] = {}

    def select(self, kind: BucketKind, size: int, sampler: Sampler) -> CapturedBucket | None:
        """Return the bucket for a batch, or None if its step runs eagerly.

        Raises:
            StrictError: the step would run eagerly and `strict` is set.
        """
        entry = self._exact.get((kind, size, sampler))
        return self._search(kind, size, sampler) if entry is None else entry

    def _search(self, kind: BucketKind, size: int, sampler: Sampler) -> CapturedBucket | None:
        smallest = smallest_bucket(self._buckets[kind], size, sampler) if self._compiles else None
        if smallest is None:
            if self._compiles:
                self._count_eager(f"no {kind} bucket holds {size} with the {sampler} sampler")
            else:
                self._count_eager("compile.dispatch is eager", expected=True)
            return None
        preferred = smallest_bucket(self._usable_or_pending(kind), size, sampler)
        if preferred is not None and self.captured_buckets[preferred].compiled is None:
            self._record_demand(preferred)
        usable = [b for b in self._buckets[kind] if self.captured_buckets[b].compiled is not None]
        selected = smallest_bucket(usable, size, sampler)
        if selected is None:
            pending = self.captured_buckets[smallest].report.state is BucketState.PENDING
            self._count_eager(self._why_unusable(smallest), expected=pending)
            return None
        entry = self.captured_buckets[selected]
        if selected == smallest:
            self._exact[kind, size, sampler] = entry
        else:
            reason = f"{self._why_unusable(smallest)}; {selected} served"
            self._report.counters.count_stand_in(reason)
        return entry

    def check_sampler(self, kind: BucketKind, sampler: Sampler) -> None:
        """Raise a ValueError if no bucket of this kind has the sampler, which `strict` forbids."""
        if smallest_bucket(self._usable_or_pending(kind), 1, sampler) is None:
            raise ValueError(
                f"strict forbids steps without a bucket, and no {kind} bucket serves the "
                f"{sampler} sampler, which the request needs: "
                f"add {sampler} to buckets.samplers, or set strict=false"
            )

    def usable_sizes(self, kind: BucketKind) -> list[int]:
        """Return the sizes of usable and pending buckets, ascending.

        With `compile.dispatch: eager`, return all sizes.
        """
        buckets = self._usable_or_pending(kind) if self._compiles else self._buckets[kind]
        return sorted({bucket.size for bucket in buckets})

    def replace(self, entry: CapturedBucket) -> None:
        """Replace the pending entry of this bucket, also in the report."""
        old = self.captured_buckets[entry.bucket].report
        self.captured_buckets[entry.bucket] = entry
        self._report.buckets = [
            entry.report if report is old else report for report in self._report.buckets
        ]
        self._exact.clear()

    def _usable_or_pending(self, kind: BucketKind) -> list[Bucket]:
        return [bucket for bucket in self._buckets[kind] if self._is_usable_or_pending(bucket)]

    def _is_usable_or_pending(self, bucket: Bucket) -> bool:
        entry = self.captured_buckets[bucket]
        return entry.compiled is not None or entry.report.state is BucketState.PENDING

    def _count_eager(self, reason: str, *, expected: bool = False) -> None:
        self._report.counters.count_fallback(reason, expected=expected)
        if self._strict:
            raise StrictError(f"a step would run eagerly: {reason}")

    def _why_unusable(self, bucket: Bucket) -> str:
        report = self.captured_buckets[bucket].report
        state = {
            BucketState.LEFT_OUT: "was left out",
            BucketState.PENDING: "is not captured yet",
        }.get(report.state, "failed")
        return f"{bucket} {state}: {report.failure}"
