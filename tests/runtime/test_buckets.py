"""Buckets cover every size up to the limit."""

import pytest

from compiled_llm.config.schema import BucketsConfig
from compiled_llm.runtime.buckets import Bucket, make_buckets, plan_buckets, smallest_bucket
from compiled_llm.runtime.limits import Limits


@pytest.mark.parametrize("growth", [1.01, 1.5, 2.0, 4.0, 100.0])
@pytest.mark.parametrize("limit", [1, 2, 3, 63, 64, 65, 500])
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_every_size_is_covered(kind, limit, growth) -> None:  # type: ignore[no-untyped-def]
    buckets = make_buckets(kind, "auto", ["greedy", "full"], limit=limit, growth=growth)
    assert buckets[-1] == Bucket(kind, limit, "full")
    assert buckets == sorted(set(buckets), key=lambda bucket: bucket.cost)
    for size in range(1, limit + 1):
        found = smallest_bucket(buckets, size, "greedy")
        assert found is not None
        assert found.size >= size
        assert found.sampler == "greedy"
        assert all(bucket.size < size for bucket in buckets if bucket.size < found.size)
    assert smallest_bucket(buckets, limit + 1, "greedy") is None


def test_the_cheapest_sampler_that_serves_is_taken() -> None:
    buckets = make_buckets("prefill", [16], ["greedy", "full"], limit=64, growth=4)
    assert smallest_bucket(buckets, 5, "greedy") == Bucket("prefill", 16, "greedy")
    assert (
        smallest_bucket(buckets, 5, "random")
        == smallest_bucket(buckets, 5, "full")
        == Bucket("prefill", 16, "full")
    )
    assert smallest_bucket(buckets, 5, "scoring") is None
    assert smallest_bucket(buckets, 17, "random") == Bucket("prefill", 64, "full")
    assert make_buckets("decode", [4], ["scoring"], limit=4, growth=4) == []
    assert str(Bucket("decode", 8, "full")) == "decode-8-full"


def test_listed_sizes_are_sorted_and_completed() -> None:
    assert [
        bucket.size for bucket in make_buckets("decode", [8, 2, 8], ["greedy"], limit=10, growth=2)
    ] == [2, 8, 10]
    assert make_buckets("prefill", [], ["greedy"], limit=10, growth=2) == []


def test_a_size_above_the_limit_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"buckets.decode must not exceed the limit of 10, got \[16\]"
    ):
        make_buckets("decode", [2, 16], ["greedy"], limit=10, growth=2)


def test_auto_sizes() -> None:
    assert [
        bucket.size for bucket in make_buckets("decode", "auto", ["greedy"], limit=64, growth=4)
    ] == [1, 4, 16, 64]
    assert [
        bucket.size for bucket in make_buckets("prefill", "auto", ["greedy"], limit=256, growth=4)
    ] == [64, 256]


@pytest.mark.parametrize("chunks", [True, False])
def test_the_buckets_of_both_kinds(chunks: bool) -> None:
    """A model that prefills one token a step has one prefill size."""
    config = BucketsConfig(decode=[2], prefill=[16], samplers=["greedy", "scoring"])
    limits = Limits(max_num_seqs=4, max_num_batched_tokens=32 if chunks else 1, max_model_len=64)
    buckets = plan_buckets(config, limits, prefill_chunks=chunks)
    sizes = {kind: sorted({bucket.size for bucket in buckets[kind]}) for kind in buckets}
    assert sizes == {"decode": [2, 4], "prefill": [16, 32] if chunks else [1]}
    assert {bucket.sampler for bucket in buckets["decode"]} == {"greedy"}
    assert {bucket.sampler for bucket in buckets["prefill"]} == {"greedy", "scoring"}


def test_no_prefill_buckets_where_none_are_listed() -> None:
    limits = Limits(max_num_seqs=4, max_num_batched_tokens=1, max_model_len=64)
    assert plan_buckets(BucketsConfig(prefill=[]), limits, prefill_chunks=False)["prefill"] == []
