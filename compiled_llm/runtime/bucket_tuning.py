"""Which sizes of steps were seen, and the bucket sizes that would have padded them least.

With the sizes in order, an optimal list of k buckets that ends at some size is an optimal list of k - 1 that ends at a smaller one
and a bucket that holds all between: a shortest path, found exactly by dynamic programming over sizes and numbers of buckets.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_NONE = 2**60  # more padding than there can be


@dataclass(slots=True, kw_only=True)
class Traffic:
    """Steps of one kind.

    Attributes:
        limit: the largest size that can come.
        buckets: the sizes compiled, small to large.
        seen: how many steps of each size came; of decode steps, sequences; of prefill steps, tokens.
    """

    limit: int
    buckets: list[int]
    seen: Counter[int] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        return {
            "limit": self.limit,
            "buckets": self.buckets,
            "seen": {str(size): n for size, n in sorted(self.seen.items())},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Traffic":
        seen = Counter({int(size): int(count) for size, count in values["seen"].items()})
        return cls(
            limit=int(values["limit"]), buckets=[int(size) for size in values["buckets"]], seen=seen
        )

    def waste(self, sizes: Sequence[int]) -> float:
        """The share of padding in all tokens computed, with buckets of these sizes; what none holds is padded to the limit."""
        computed = sum(count * self._padded(size, sizes) for size, count in self.seen.items())
        return (
            1 - sum(size * count for size, count in self.seen.items()) / computed
            if computed
            else 0.0
        )

    def suggest(self, number: int) -> list[int]:
        """The sizes of at most so many buckets, the limit among them, that pad what was seen least."""
        if number < 1:
            raise ValueError(f"expected at least one bucket, got {number}")
        return best_sizes({**self.seen, self.limit: self.seen[self.limit]}, number)

    def _padded(self, size: int, sizes: Sequence[int]) -> int:
        return min((bucket for bucket in sizes if bucket >= size), default=self.limit)


def best_sizes(seen: Mapping[int, int], number: int) -> list[int]:
    """At most `number` of the sizes, the largest among them, such that rounding every size up to one of them adds least."""
    sizes = np.array(sorted(seen))
    counts = np.array([seen[size] for size in sizes.tolist()])
    steps, tokens = (
        np.concatenate([[0], np.cumsum(values)]) for values in (counts, counts * sizes)
    )
    # least[j]: padding of the first j sizes in the best list that ends at the j-th; came[k][j]: where its last bucket but one ends.
    n = len(sizes)
    least = np.array([0] + [_NONE] * n)
    came: list[list[int]] = []
    for _ in range(min(number, n)):
        better, origin = np.full(n + 1, _NONE), [0] * (n + 1)
        for j in range(1, n + 1):
            through = least[:j] + sizes[j - 1] * (steps[j] - steps[:j]) - (tokens[j] - tokens[:j])
            origin[j] = int(np.argmin(through))
            better[j] = through[origin[j]]
        least = better
        came.append(origin)
    chosen, j = [], n
    for origin in reversed(came):
        chosen.append(int(sizes[j - 1]))
        j = origin[j]
    return chosen[::-1]
