"""Buckets cover every size up to the limit."""

import pytest

from compiled_llm.runtime.buckets import Bucket, make_buckets, match


@pytest.mark.parametrize("growth", [1.01, 1.5, 2.0, 4.0, 100.0])
@pytest.mark.parametrize("limit", [1, 2, 3, 63, 64, 65, 500])
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_every_size_is_covered(kind, limit, growth) -> None:  # type: ignore[no-untyped-def]
    buckets = make_buckets(kind, "auto", limit=limit, growth=growth)
    assert buckets[-1] == Bucket(kind, limit)
    assert buckets == sorted(set(buckets))
    for size in range(1, limit + 1):
        found = match(buckets, size)
        assert found is not None
        assert found.size >= size
        assert all(bucket.size < size for bucket in buckets if bucket.size < found.size)
    assert match(buckets, limit + 1) is None


def test_listed_sizes_are_sorted_and_completed() -> None:
    assert [bucket.size for bucket in make_buckets("decode", [8, 2, 8], limit=10, growth=2)] == [2, 8, 10]
    assert make_buckets("prefill", [], limit=10, growth=2) == []


def test_a_size_above_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"buckets.decode lists \[16\], above the limit of 10"):
        make_buckets("decode", [2, 16], limit=10, growth=2)


def test_auto_sizes() -> None:
    assert [bucket.size for bucket in make_buckets("decode", "auto", limit=64, growth=4)] == [1, 4, 16, 64]
    assert [bucket.size for bucket in make_buckets("prefill", "auto", limit=256, growth=4)] == [64, 256]
