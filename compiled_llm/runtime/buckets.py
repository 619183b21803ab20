"""Static shapes: which are compiled, and which one serves a batch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from compiled_llm.config.schema import Sampler

BucketKind = Literal["decode", "prefill"]

# Each serves everything that those before it serve, at a higher price.
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
_SMALLEST: dict[BucketKind, int] = {"decode": 1, "prefill": 64}


@dataclass(frozen=True, slots=True)
class Bucket:
    """A shape: `size` sequences of a decode step, or `size` tokens of a prefill step, and how it samples.

    Samplers: `greedy` takes the most likely token; `random` adds temperature and seed; `full` everything that
    `SamplingParams` has; `scoring`, for prefill alone, also gives logprobs of the prompt. Printed as e.g. `decode-8-greedy`.
    """

    kind: BucketKind
    size: int
    sampler: Sampler = "greedy"

    def __str__(self) -> str:
        return f"{self.kind}-{self.size}-{self.sampler}"

    @property
    def cost(self) -> tuple[int, int]:
        """Orders buckets by what a step of theirs costs."""
        return self.size, SAMPLERS.index(self.sampler)


def make_buckets(
    kind: BucketKind,
    sizes: Sequence[int] | str,
    samplers: Iterable[Sampler],
    *,
    limit: int,
    growth: float,
) -> list[Bucket]:
    """The buckets of one kind, cheap to dear, `limit` always among the sizes; none at all where an empty list asks for that.

    Raises:
        ValueError: a listed size is above the limit.
    """
    if isinstance(sizes, str):  # "auto"
        sizes = _geometric(min(_SMALLEST[kind], limit), limit, growth)
    above = [size for size in sizes if size > limit]
    if above:
        raise ValueError(
            f"buckets.{kind} lists {above}, above the limit of {limit}: raise the limit or drop them"
        )
    serving = [sampler for sampler in samplers if kind == "prefill" or sampler != "scoring"]
    buckets = [
        Bucket(kind, size, sampler)
        for size in ({*sizes, limit} if sizes else ())
        for sampler in serving
    ]
    return sorted(buckets, key=lambda bucket: bucket.cost)


def smallest_bucket(buckets: Sequence[Bucket], size: int, sampler: Sampler) -> Bucket | None:
    """The first of the buckets, given cheap to dear, that holds `size` and samples as asked, or None."""
    wanted = SAMPLERS.index(sampler)
    return next(
        (
            bucket
            for bucket in buckets
            if bucket.size >= size and SAMPLERS.index(bucket.sampler) >= wanted
        ),
        None,
    )


def _geometric(smallest: int, largest: int, growth: float) -> list[int]:
    sizes, size = [largest], float(smallest)
    while size < largest:
        sizes.append(int(size))
        size = max(size * growth, size + 1)
    return sorted(set(sizes))
