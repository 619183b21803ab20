"""Static shapes: which sizes are compiled, and which one serves a batch."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["decode", "prefill"]

_SMALLEST: dict[Kind, int] = {"decode": 1, "prefill": 64}


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A shape: `size` sequences of a decode step, or `size` tokens of a prefill step. Printed as e.g. `decode-8`."""

    kind: Kind
    size: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.size}"


def make_buckets(kind: Kind, sizes: Sequence[int] | str, *, limit: int, growth: float) -> list[Bucket]:
    """The buckets of one kind, small to large, `limit` always among them; none at all where an empty list asks for that.

    Raises:
        ValueError: a listed size is above the limit.
    """
    if isinstance(sizes, str):  # "auto"
        return [Bucket(kind, size) for size in _geometric(min(_SMALLEST[kind], limit), limit, growth)]
    above = [size for size in sizes if size > limit]
    if above:
        raise ValueError(f"buckets.{kind} lists {above}, above the limit of {limit}: raise the limit or drop them")
    return [Bucket(kind, size) for size in sorted({*sizes, limit})] if sizes else []


def match(buckets: Sequence[Bucket], size: int) -> Bucket | None:
    """The smallest of the sorted buckets that holds `size`, or None."""
    index = bisect.bisect_left(buckets, size, key=lambda bucket: bucket.size)
    return buckets[index] if index < len(buckets) else None


def _geometric(smallest: int, largest: int, growth: float) -> list[int]:
    sizes, size = [largest], float(smallest)
    while size < largest:
        sizes.append(int(size))
        size = max(size * growth, size + 1)
    return sorted(set(sizes))
