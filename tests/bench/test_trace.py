"""Busy and idle time of device spans, and counts of launches."""

import pytest

from bench.trace import busy_us, count_launches, idle_between_launches


def test_overlapping_spans_are_busy_once() -> None:
    assert busy_us([(0.0, 4.0, 1), (2.0, 5.0, 1), (6.0, 8.0, 1), (10.0, 12.0, 2)]) == 9.0
    assert busy_us([]) == 0.0


def test_gaps_within_a_launch_are_not_idle() -> None:
    spans = [(0.0, 4.0, 1), (2.0, 5.0, 1), (6.0, 8.0, 1), (10.0, 12.0, 2)]
    assert idle_between_launches(spans) == pytest.approx(2 / 12)
    assert idle_between_launches([]) is None


def test_launches_are_counted_by_kind() -> None:
    names = ["cudaGraphLaunch", "cudaMemcpyAsync", "aten::mm", "cudaMemcpyAsync"]
    assert count_launches(names) == {"cudaGraphLaunch": 1, "cudaMemcpy": 2}
