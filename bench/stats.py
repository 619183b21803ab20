"""Figures from rounds: the median, how far they spread, and ratios of rounds that ran side by side."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """The median of some rounds, and the lowest and highest of them."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """(high - low) / median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def figure(samples: Sequence[float]) -> Figure:
    """Of at least one sample."""
    assert samples
    return Figure(median=statistics.median(samples), low=min(samples), high=max(samples))


def ratio(samples: Sequence[float], others: Sequence[float]) -> float | None:
    """The median of samples / others, round by round; what slows a machine for a while so slows both. None without a pair."""
    pairs = [sample / other for sample, other in zip(samples, others, strict=False) if other]
    return statistics.median(pairs) if pairs else None
