"""Medians, spreads and ratios."""

from bench.stats import median_ratio, summarize


def test_summary_has_median_range_and_spread() -> None:
    summary = summarize([3.0, 1.0, 2.0])
    assert (summary.median, summary.low, summary.high, summary.spread) == (2.0, 1.0, 3.0, 1.0)


def test_spread_of_zeros_is_zero() -> None:
    assert summarize([0.0, 0.0]).spread == 0.0


def test_ratio_pairs_the_rounds() -> None:
    assert median_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0


def test_ratio_ignores_incomplete_pairs() -> None:
    assert median_ratio([2.0, 4.0], [1.0]) == 2.0
    assert median_ratio([], [1.0]) is None
    assert median_ratio([1.0], [0.0]) is None
