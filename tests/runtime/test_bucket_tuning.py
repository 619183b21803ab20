"""Suggested bucket sizes pad as little as the best of all lists, and no more than the default."""

from collections import Counter
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from compiled_llm.runtime.bucket_tuning import Traffic, best_sizes
from compiled_llm.runtime.buckets import make_buckets

SEEN = st.dictionaries(st.integers(1, 64), st.integers(1, 1000), min_size=1, max_size=9)


def padding(seen: dict[int, int], sizes: tuple[int, ...]) -> int:
    return sum(
        count * (min(bucket for bucket in sizes if bucket >= size) - size)
        for size, count in seen.items()
    )


@settings(deadline=None)
@given(SEEN, st.integers(1, 10))
def test_no_list_of_as_many_sizes_pads_less(seen: dict[int, int], number: int) -> None:
    found = best_sizes(seen, number)
    assert found == sorted(set(found))
    assert len(found) <= number
    assert found[-1] == max(seen)
    smaller = sorted(seen)[:-1]
    lists = [(*chosen, max(seen)) for chosen in combinations(smaller, min(number, len(seen)) - 1)]
    assert padding(seen, tuple(found)) == min(padding(seen, sizes) for sizes in lists)


@settings(deadline=None)
@given(st.dictionaries(st.integers(1, 256), st.integers(1, 1000), min_size=1), st.floats(1.2, 8))
def test_never_worse_than_the_default_list(seen: dict[int, int], growth: float) -> None:
    default = [
        bucket.size
        for bucket in make_buckets("decode", "auto", ["greedy"], limit=256, growth=growth)
    ]
    traffic = Traffic(limit=256, buckets=default, seen=Counter(seen))
    suggested = traffic.suggest(len(default))
    assert suggested[-1] == 256, "the limit is always a bucket"
    assert traffic.waste(suggested) <= traffic.waste(default) + 1e-12


def test_waste_is_the_share_of_padding() -> None:
    traffic = Traffic(limit=8, buckets=[4, 8], seen=Counter({3: 2, 8: 1}))
    assert traffic.waste([4, 8]) == 1 - (6 + 8) / (8 + 8)
    assert traffic.waste([3, 8]) == 0
    assert traffic.waste([]) == 1 - 14 / 24
    assert traffic.suggest(2) == [3, 8]
    assert Traffic.from_dict(traffic.to_dict()) == traffic


def test_thousands_of_sizes_are_fast() -> None:
    seen = {size: 1 + size % 7 for size in range(1, 2049)}
    sizes = best_sizes(seen, 12)
    assert len(sizes) == 12
    assert sizes[-1] == 2048
