"""Statistics over rounds: medians, spreads, and ratios of rounds measured side by side."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Median, minimum and maximum of some samples."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Return (high - low) / median, or 0 when the median is 0."""
        return (self.high - self.low) / self.median if self.median else 0.0


def summarize(samples: Sequence[float]) -> Summary:
    """Return the summary of at least one sample."""
    assert samples, "expected at least one sample"
    return Summary(median=statistics.median(samples), low=min(samples), high=max(samples))


def median_ratio(samples: Sequence[float], baseline: Sequence[float]) -> float | None:
    """Return the median over rounds of sample / baseline, or None without a complete pair.

    Ratios are taken round by round, because a temporary slowdown of the machine affects both
    samples of a round.
    """
    pairs = [sample / base for sample, base in zip(samples, baseline, strict=False) if base]
    return statistics.median(pairs) if pairs else None
