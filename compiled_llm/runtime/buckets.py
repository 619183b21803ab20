"""Static shapes: which are compiled, and which is the smallest that holds a batch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from compiled_llm.config.schema import BucketsConfig, Sampler
from compiled_llm.runtime.limits import Limits

BucketKind = Literal["decode", "prefill"]

# In order of cost: each serves everything that the samplers before it serve.
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
_SMALLEST: dict[BucketKind, int] = {"decode": 1, "prefill": 64}


@dataclass(frozen=True, slots=True)
class Bucket:
    """A static shape of a step. Printed as, for example, `decode-8-greedy`.

    Attributes:
        kind: whether the step decodes or prefills.
        size: sequences of a decode step, or tokens of a prefill step.
        sampler: `greedy` takes the most likely token; `random` adds temperature and seed; `full`
            supports all of `SamplingParams`; `scoring`, for prefill alone, also returns logprobs of
            the prompt.
    """

    kind: BucketKind
    size: int
    sampler: Sampler = "greedy"

    def __str__(self) -> str:
        return f"{self.kind}-{self.size}-{self.sampler}"

    @property
    def cost(self) -> tuple[int, int]:
        """Sort key by which buckets are ordered from cheap to expensive."""
        return self.size, SAMPLERS.index(self.sampler)


def make_buckets(
    kind: BucketKind,
    sizes: Sequence[int] | str,
    samplers: Iterable[Sampler],
    *,
    limit: int,
    growth: float,
) -> list[Bucket]:
    """Return the buckets of one kind, cheap to expensive.

    Args:
        kind: of all buckets.
        sizes: a list, to which `limit` is added, or "auto". An empty list gives no buckets.
        samplers: one bucket of each size is made for each; decode buckets leave out `scoring`.
        limit: the largest size of a batch.
        growth: the ratio between successive sizes for "auto".

    Raises:
        ValueError: a listed size exceeds the limit.
    """
    if isinstance(sizes, str):  # "auto"
        sizes = _geometric_sizes(min(_SMALLEST[kind], limit), limit, growth)
    too_large = [size for size in sizes if size > limit]
    if too_large:
        raise ValueError(
            f"buckets.{kind} must not exceed the limit of {limit}, got {too_large}: "
            "raise the limit or remove these sizes"
        )
    supported = [sampler for sampler in samplers if kind == "prefill" or sampler != "scoring"]
    buckets = [
        Bucket(kind, size, sampler)
        for size in ({*sizes, limit} if sizes else ())
        for sampler in supported
    ]
    return sorted(buckets, key=lambda bucket: bucket.cost)


def plan_buckets(
    config: BucketsConfig, limits: Limits, *, prefill_chunks: bool
) -> dict[BucketKind, list[Bucket]]:
    """Return the buckets of each kind that the config lists.

    Args:
        config: sizes, samplers and growth.
        limits: the largest sizes.
        prefill_chunks: whether a prefill step may have several tokens; otherwise the only prefill
            size is 1.

    Raises:
        ValueError: see `make_buckets`.
    """
    samplers, growth = config.listed_samplers(), config.growth
    prefill = config.prefill if prefill_chunks else config.prefill and [1]
    return {
        "decode": make_buckets(
            "decode", config.decode, samplers, limit=limits.max_num_seqs, growth=growth
        ),
        "prefill": make_buckets(
            "prefill", prefill, samplers, limit=limits.max_num_batched_tokens, growth=growth
        ),
    }


def smallest_bucket(buckets: Sequence[Bucket], size: int, sampler: Sampler) -> Bucket | None:
    """Return the first bucket that holds `size` with `sampler`, or None.

    The buckets must be ordered cheap to expensive.
    """
    cost = SAMPLERS.index(sampler)
    return next(
        (
            bucket
            for bucket in buckets
            if bucket.size >= size and SAMPLERS.index(bucket.sampler) >= cost
        ),
        None,
    )


def _geometric_sizes(smallest: int, largest: int, growth: float) -> list[int]:
    sizes, size = [largest], float(smallest)
    while size < largest:
        sizes.append(int(size))
        size = max(size * growth, size + 1)
    return sorted(set(sizes))
