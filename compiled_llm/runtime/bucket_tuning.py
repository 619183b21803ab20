"""Counts of step sizes, and the bucket sizes that would have padded these steps least.

With the sizes in order, an optimal list of k buckets that ends at some size consists of an optimal
list of k - 1 buckets that ends at a smaller size, and one bucket for all sizes in between. Dynamic
programming over sizes and numbers of buckets finds it exactly.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_UNREACHABLE = 2**60  # exceeds any amount of padding


@dataclass(slots=True, kw_only=True)
class Traffic:
    """Steps of one kind.

    Attributes:
        limit: the largest size of a step.
        buckets: the compiled sizes, ascending.
        seen: number of steps of each size, in sequences for decode and in tokens for prefill.
    """

    limit: int
    buckets: list[int]
    seen: Counter[int] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values; `from_dict` is the inverse."""
        seen = {str(size): count for size, count in sorted(self.seen.items())}
        return {"limit": self.limit, "buckets": self.buckets, "seen": seen}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Traffic":
        seen = Counter({int(size): int(count) for size, count in values["seen"].items()})
        buckets = [int(size) for size in values["buckets"]]
        return cls(limit=int(values["limit"]), buckets=buckets, seen=seen)

    def waste(self, sizes: Sequence[int]) -> float:
        """Return the share of padding in all computed tokens, with buckets of these sizes.

        Steps that exceed all buckets are padded to the limit.
        """
        used = sum(size * count for size, count in self.seen.items())
        computed = sum(count * self._padded(size, sizes) for size, count in self.seen.items())
        return 1 - used / computed if computed else 0.0

    def suggest(self, number: int) -> list[int]:
        """Return at most `number` bucket sizes, the limit among them, that pad these steps least.

        Raises:
            ValueError: `number` is less than 1.
        """
        if number < 1:
            raise ValueError(f"expected at least one bucket, got {number}")
        return best_sizes({**self.seen, self.limit: self.seen[self.limit]}, number)

    def _padded(self, size: int, sizes: Sequence[int]) -> int:
        return min((bucket for bucket in sizes if bucket >= size), default=self.limit)


def best_sizes(seen: Mapping[int, int], number: int) -> list[int]:
    """Return at most `number` of the sizes, the largest among them, with the least padding.

    Each step is padded to the next size in the list. The time is O(number * len(seen)**2).

    Args:
        seen: number of steps of each size.
        number: at least 1.
    """
    sizes = np.array(sorted(seen))
    counts = np.array([seen[size] for size in sizes.tolist()])
    steps = np.concatenate([[0], np.cumsum(counts)])
    tokens = np.concatenate([[0], np.cumsum(counts * sizes)])
    n = len(sizes)
    # least[j]: padding of the first j sizes with the best list that ends at the j-th.
    # origins[k][j]: where the second last bucket of this list ends, with k + 1 buckets.
    least = np.array([0] + [_UNREACHABLE] * n)
    origins: list[list[int]] = []
    for _ in range(min(number, n)):
        better, origin = np.full(n + 1, _UNREACHABLE), [0] * (n + 1)
        for j in range(1, n + 1):
            padding = sizes[j - 1] * (steps[j] - steps[:j]) - (tokens[j] - tokens[:j])
            total = least[:j] + padding
            origin[j] = int(np.argmin(total))
            better[j] = total[origin[j]]
        least = better
        origins.append(origin)
    chosen, j = [], n
    for origin in reversed(origins):
        chosen.append(int(sizes[j - 1]))
        j = origin[j]
    return chosen[::-1]
