"""Random pages for the sequences of a random batch.

To fill the pages of a sequence as long as `limits.max_model_len` would take long, so its block
table names some pages several times. Its pages are in regions, each with values around a mean of
its own: a step that leaves out a part of the sequence, or reads another part instead, is then off
by far, although each of so many keys has little weight.

Shape suffixes: S sequences; G groups of layers; N pages of a row at most.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compiled_llm.runtime.memory.allocation import Memory
from compiled_llm.runtime.step.batch_inputs import TRASH_PAGE, Int64
from passes.attention_reach import AttentionReach

NUM_REGIONS = 4
NUM_SPARE = 4  # rows, and pages of each group, that no sequence of the batch uses


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomPages:
    """The pages of a batch.

    Attributes:
        tables: [G, S, N] int32, block tables; the trash page where no window reaches.
        used: for each group the pages to prepare: those in the tables, and `NUM_SPARE` others.
        regions: for each group the region of each of its `used` pages, from 1 on, or 0 for pages
            that are in one place only.
    """

    tables: NDArray[np.int32]
    used: list[Int64]
    regions: list[Int64]


def assign_pages(
    rng: np.random.Generator, memory: Memory, num_cached: Int64, num_new: Int64, spare: int
) -> RandomPages:
    """Assign pages to the sequences, at random.

    Args:
        rng: the source of randomness.
        memory: of the engine.
        num_cached, num_new: [S] tokens that each sequence has cached, and its tokens in the batch.
        spare: pages that each sequence may use besides those that `num_new` tokens fill. Where it
            needs more, some are used several times.
    """
    shape = len(memory.groups), len(num_new), memory.state.max_blocks
    tables = np.full(shape, TRASH_PAGE, np.int32)
    used, regions = [], []
    for group, members in enumerate(memory.groups):
        free = rng.permutation(members.num_pages - 1) + 1
        group_regions = np.zeros(len(free), np.int64)
        taken = 0
        for seq, (cached, new) in enumerate(
            zip(num_cached.tolist(), num_new.tolist(), strict=True)
        ):
            taken = _assign_sequence(
                rng,
                tables[group, seq],
                free,
                group_regions,
                taken,
                _blocks(cached, new, members.reach, memory.block_size),
                max_pages=spare + -(-new // memory.block_size),
            )
        used.append(free[: taken + NUM_SPARE])
        regions.append(group_regions[: taken + NUM_SPARE])
    return RandomPages(tables=tables, used=used, regions=regions)


def _blocks(cached: int, new: int, reach: AttentionReach, block_size: int) -> tuple[int, int, int]:
    """Return the first visible block, the first one that is written, and the end."""
    first = max(0, reach.first_visible(cached)) // block_size
    return first, cached // block_size, -(-(cached + new) // block_size)


def _assign_sequence(
    rng: np.random.Generator,
    table_N: NDArray[np.int32],
    free: Int64,
    regions: Int64,
    taken: int,
    blocks: tuple[int, int, int],
    *,
    max_pages: int,
) -> int:
    """Fill the table of one sequence from `free[taken:]`, and return the new `taken`.

    Blocks that the batch writes have a page each.
    """
    first, written, end = blocks
    num_read, num_written = written - first, end - written
    num_pages = min(num_read, max(1, max_pages - num_written))
    if num_pages < num_read:
        regions[taken : taken + num_pages] = _regions_in_order(num_pages) + 1
        chosen = _choose_pages(rng, num_read, num_pages)
    else:
        chosen = np.arange(num_pages)
    table_N[first:written] = free[taken + chosen]
    taken += num_pages
    table_N[written:end] = free[taken : taken + num_written]
    return taken + num_written


def _regions_in_order(length: int) -> Int64:
    """Divide a sequence of this length into regions, [length], from 0 on."""
    regions: Int64 = np.arange(length) * NUM_REGIONS // length
    return regions


def _choose_pages(rng: np.random.Generator, num_blocks: int, num_pages: int) -> Int64:
    """Choose a page of the block's region for each block, [num_blocks]."""
    bounds = np.searchsorted(_regions_in_order(num_pages), np.arange(NUM_REGIONS + 1))
    block_regions = _regions_in_order(num_blocks)
    begins, ends = bounds[block_regions], bounds[block_regions + 1]
    offsets = (rng.random(num_blocks) * (ends - begins)).astype(np.int64)
    chosen: Int64 = np.where(begins < ends, begins + offsets, 0)
    return chosen
