"""Selection of buckets: the smallest usable one serves, and everything else is counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiled_llm.config.schema import Sampler
from compiled_llm.errors import StrictError
from compiled_llm.report.report import BucketReport, BucketState, Report
from compiled_llm.runtime.buckets import SAMPLERS, Bucket, BucketKind, make_buckets, smallest_bucket
from compiled_llm.runtime.capture.bucket_selector import BucketSelector
from compiled_llm.runtime.capture.captured_bucket import CapturedBucket
from compiled_llm.runtime.compilation.compiler import CompiledStep
from compiled_llm.runtime.compilation.timing import Timestamp, durations

SIZES = {"decode": [1, 2, 4], "prefill": [16, 64]}


def _step() -> CompiledStep:
    now = Timestamp.now()
    return CompiledStep(
        launch=lambda: None,
        graph=False,
        recording=None,
        function=None,
        seconds=durations(now, now, now),
    )


def _entry(bucket: Bucket, state: BucketState = BucketState.COMPILED) -> CapturedBucket:
    usable = state in (BucketState.COMPILED, BucketState.GRAPH)
    report = BucketReport(
        bucket=str(bucket), size=bucket.size, state=state, failure=None if usable else "injected"
    )
    return CapturedBucket(bucket=bucket, report=report, compiled=_step() if usable else None)


class _Selection:
    """A selector of buckets in given states, with its report and the demand that it recorded."""

    def __init__(
        self,
        states: dict[str, BucketState] | None = None,
        *,
        samplers: tuple[Sampler, ...] = ("greedy", "full"),
        strict: bool = False,
        compiles: bool = True,
    ) -> None:
        buckets: dict[BucketKind, list[Bucket]] = {
            "decode": make_buckets("decode", SIZES["decode"], samplers, limit=4, growth=2),
            "prefill": make_buckets("prefill", SIZES["prefill"], samplers, limit=64, growth=2),
        }
        states = states or {}
        entries = [
            _entry(bucket, states.get(str(bucket), BucketState.COMPILED))
            for of_kind in buckets.values()
            for bucket in of_kind
        ]
        self.report = Report(buckets=[entry.report for entry in entries])
        self.demand: list[str] = []
        self.selector = BucketSelector(
            buckets,
            entries if compiles else None,
            self.report,
            strict=strict,
            on_demand=lambda bucket: self.demand.append(str(bucket)),
        )

    def select(self, kind: BucketKind, size: int, sampler: Sampler = "greedy") -> str | None:
        entry = self.selector.select(kind, size, sampler)
        return None if entry is None else str(entry.bucket)


@given(st.integers(1, 4), st.sampled_from(SAMPLERS[:3]))
def test_the_smallest_bucket_serves_and_is_not_counted(size: int, sampler: Sampler) -> None:
    selection = _Selection()
    buckets = list(selection.selector.captured_buckets)
    expected = smallest_bucket([b for b in buckets if b.kind == "decode"], size, sampler)
    for _ in range(2):  # searched, then remembered
        assert selection.select("decode", size, sampler) == str(expected)
    assert not selection.report.fallbacks
    assert not selection.report.stand_ins
    assert not selection.demand


def test_a_larger_bucket_serves_for_one_that_failed() -> None:
    selection = _Selection({"decode-2-greedy": BucketState.FAILED})
    for _ in range(3):
        assert selection.select("decode", 2) == "decode-2-full"
    assert selection.report.stand_ins == {
        "decode-2-greedy failed: injected; decode-2-full served": 3
    }
    assert not selection.report.fallbacks
    assert not selection.demand


def test_a_pending_bucket_is_demanded_until_it_is_replaced() -> None:
    selection = _Selection({"prefill-16-greedy": BucketState.PENDING})
    assert selection.select("prefill", 10) == "prefill-16-full"
    assert selection.demand == ["prefill-16-greedy"]
    assert list(selection.report.stand_ins) == [
        "prefill-16-greedy is not captured yet: injected; prefill-16-full served"
    ]
    captured = _entry(Bucket("prefill", 16, "greedy"))
    selection.selector.replace(captured)
    assert selection.select("prefill", 10) == "prefill-16-greedy"
    assert selection.demand == ["prefill-16-greedy"]
    assert any(report is captured.report for report in selection.report.buckets)
    assert len(selection.report.buckets) == len(selection.selector.captured_buckets)


def test_the_smallest_pending_bucket_is_demanded_if_a_smaller_one_failed() -> None:
    selection = _Selection(
        {"decode-1-greedy": BucketState.FAILED, "decode-1-full": BucketState.PENDING}
    )
    assert selection.select("decode", 1) == "decode-2-greedy"
    assert selection.demand == ["decode-1-full"]


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (BucketState.LEFT_OUT, "decode-4-full was left out: injected"),
        (BucketState.PENDING, "decode-4-full is not captured yet: injected"),
        (BucketState.FAILED, "decode-4-full failed: injected"),
    ],
)
def test_a_step_without_a_usable_bucket_is_counted_by_its_reason(
    state: BucketState, reason: str
) -> None:
    selection = _Selection({"decode-4-full": state})
    assert selection.select("decode", 4, "random") is None
    assert selection.report.fallbacks == {reason: 1}
    assert selection.demand == (["decode-4-full"] if state is BucketState.PENDING else [])


def test_a_batch_that_no_bucket_holds_is_counted() -> None:
    selection = _Selection(samplers=("greedy",))
    assert selection.select("decode", 5) is None
    assert selection.select("prefill", 3, "scoring") is None
    assert selection.report.fallbacks == {
        "no decode bucket holds 5 with the greedy sampler": 1,
        "no prefill bucket holds 3 with the scoring sampler": 1,
    }


def test_nothing_is_selected_with_eager_dispatch() -> None:
    selection = _Selection(compiles=False)
    assert selection.select("decode", 1) is None
    assert selection.report.fallbacks == {"compile.dispatch is eager": 1}
    assert selection.selector.usable_sizes("prefill") == [16, 64]


def test_strict_makes_a_fallback_an_error() -> None:
    selection = _Selection({"decode-4-full": BucketState.FAILED}, strict=True)
    with pytest.raises(StrictError, match="would run eagerly: decode-4-full failed: injected"):
        selection.select("decode", 4, "full")
    assert selection.report.fallbacks.total() == 1


def test_samplers_that_no_bucket_serves_are_refused() -> None:
    selection = _Selection(
        {f"decode-{size}-full": BucketState.FAILED for size in SIZES["decode"]}, strict=True
    )
    selection.selector.check_sampler("decode", "greedy")
    selection.selector.check_sampler("prefill", "full")
    with pytest.raises(ValueError, match=r"no decode bucket serves the full sampler.*add full to"):
        selection.selector.check_sampler("decode", "full")
    with pytest.raises(ValueError, match="no prefill bucket serves the scoring sampler"):
        selection.selector.check_sampler("prefill", "scoring")


def test_usable_sizes_include_pending_ones() -> None:
    selection = _Selection(
        {"decode-1-greedy": BucketState.PENDING, "decode-2-greedy": BucketState.LEFT_OUT},
        samplers=("greedy",),
    )
    assert selection.selector.usable_sizes("decode") == [1, 4]
