"""Blocks that the rows of the batch use in one group of layers.

Shapes: R rows, N blocks of a sequence at most.
"""

import numpy as np
from numpy.typing import NDArray

from compiled_llm.engine.block_pool import BlockPool
from compiled_llm.runtime.memory.kv_cache import KVCacheGroup
from compiled_llm.runtime.step.batch_inputs import TRASH_PAGE


class BlockTable:
    """Block table of one group, with the pool that its blocks come from.

    Args:
        group: the group's window and number of blocks.
        block_size: tokens of a block.
        block_ids: [R, N] int32, written in place; `TRASH_PAGE` where a row has no block.

    Attributes:
        reach: the tokens to which a query attends.
        begin, end: [R]; a row uses its blocks from `begin` to `end`, which lie in the window.
    """

    def __init__(
        self, group: KVCacheGroup, *, block_size: int, block_ids: NDArray[np.int32]
    ) -> None:
        self.pool = BlockPool(group.num_pages)
        self.reach = group.reach
        self.block_size = block_size
        self.block_ids = block_ids
        self.begin = np.zeros(len(block_ids), np.int64)
        self.end = np.zeros(len(block_ids), np.int64)

    def first_visible(self, position: int) -> int:
        """Return the first block that a query at this position attends to."""
        return max(0, self.reach.first_visible(position)) // self.block_size

    def num_needed(self, row: int, end: int) -> int:
        """Return how many more blocks the row needs for its tokens up to `end`."""
        return max(0, self._num_blocks(end) - int(self.end[row]))

    def num_needed_to_admit(self, hashes: list[bytes], num_shared: int, end: int) -> int:
        """Return how many free blocks a new row takes for its tokens up to `end`.

        Where a window frees blocks during prefill, this is the most that it uses at a time,
        shared ones included.
        """
        needed = self._num_blocks(end) - num_shared
        begin = self.first_visible(num_shared * self.block_size)
        if not self.reach.is_full:
            most = self.reach.size // self.block_size + 2
            needed = min(needed, most - (num_shared - begin))
        return needed + self.pool.num_cached_free(hashes[begin:num_shared])

    def share(self, row: int, hashes: list[bytes], count: int) -> None:
        """Give an empty row the cached blocks with the first `count` hashes that are visible."""
        begin = self.first_visible(count * self.block_size)
        block_ids = [self.pool.get_cached_block(block_hash) for block_hash in hashes[begin:count]]
        found = [block_id for block_id in block_ids if block_id is not None]
        assert len(found) == count - begin, "a shared block is not cached"
        self.pool.touch(found)
        self.block_ids[row, begin:count] = found
        self.begin[row] = begin
        self.end[row] = count

    def extend(self, row: int, end: int) -> None:
        """Allocate the blocks that the row needs for its tokens up to `end`."""
        old, new = int(self.end[row]), self._num_blocks(end)
        if new > old:
            self.block_ids[row, old:new] = self.pool.allocate(new - old)
            self.end[row] = new

    def free_invisible(self, row: int, position: int) -> None:
        """Free the blocks that no query from this position on attends to."""
        if not self.reach.is_full:
            self._free_before(row, self.first_visible(position))

    def free(self, row: int) -> None:
        """Free all blocks of the row."""
        self._free_before(row, int(self.end[row]))
        self.begin[row] = self.end[row] = 0

    def cache_full_blocks(self, row: int, hashes: list[bytes], first: int, end: int) -> None:
        """Cache the row's blocks from `first` to `end`, which are full."""
        if not self.reach.is_full:
            first = max(first, int(self.begin[row]))
        self.pool.cache_full_blocks(self.block_ids[row, first:end].tolist(), hashes[first:end])

    def uncache(self, row: int) -> None:
        """Remove the row's blocks from the prefix cache."""
        self.pool.uncache(self.used(row))

    def mark_recently_used(self, hashes: list[bytes], count: int) -> None:
        """Evict the visible blocks of a prefix of `count` blocks after all others."""
        first = self.first_visible(count * self.block_size)
        self.pool.mark_recently_used(hashes[first:count])

    def used(self, row: int) -> list[int]:
        """Return the ids of the blocks that the row uses."""
        block_ids: list[int] = self.block_ids[row, self.begin[row] : self.end[row]].tolist()
        return block_ids

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _free_before(self, row: int, block: int) -> None:
        begin = int(self.begin[row])
        if block > begin:
            self.pool.free(self.block_ids[row, begin:block].tolist())
            self.block_ids[row, begin:block] = TRASH_PAGE
            self.begin[row] = block
