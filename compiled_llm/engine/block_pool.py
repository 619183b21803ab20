"""Block allocator of one group of layers, with reference counts and prefix caching.

A full block is identified by a hash of all tokens up to its end (see `prefix_cache.hash_blocks`).
A block whose reference count drops to 0 stays cached until it is allocated again; the least
recently used block is evicted first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Allocates blocks 1 to `num_blocks - 1`; block 0 receives what padding writes."""

    def __init__(self, num_blocks: int) -> None:
        self.capacity = num_blocks - 1
        self._ref_counts = [0] * num_blocks
        self._uncached_free = list(range(num_blocks - 1, 0, -1))
        # Least recently used first.
        self._cached_free: OrderedDict[int, None] = OrderedDict()
        self._hash_of_block: dict[int, bytes] = {}
        self._block_of_hash: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Number of blocks that no sequence uses, cached ones included."""
        return len(self._uncached_free) + len(self._cached_free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Allocate blocks; the caller has checked that enough are free."""
        assert num_blocks <= self.num_free_blocks, (
            f"{num_blocks} blocks requested, {self.num_free_blocks} free"
        )
        block_ids = [
            self._uncached_free.pop() if self._uncached_free else self._evict_lru()
            for _ in range(num_blocks)
        ]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        return block_ids

    def get_cached_block(self, block_hash: bytes) -> int | None:
        """Return the block with this hash, or None if it is not cached."""
        return self._block_of_hash.get(block_hash)

    def num_cached(self, block_hashes: Sequence[bytes]) -> int:
        """Return how many of the hashes are cached, up to the first that is not."""
        for number, block_hash in enumerate(block_hashes):
            if block_hash not in self._block_of_hash:
                return number
        return len(block_hashes)

    def num_cached_free(self, block_hashes: Sequence[bytes]) -> int:
        """Return how many of the blocks with these hashes, all cached, no sequence uses.

        Sharing such a block reduces the number of free blocks by one.
        """
        return sum(self._block_of_hash[key] in self._cached_free for key in block_hashes)

    def mark_recently_used(self, block_hashes: Sequence[bytes]) -> None:
        """Evict the blocks with these hashes only after all other cached blocks."""
        for block_hash in reversed(block_hashes):
            block_id = self._block_of_hash.get(block_hash)
            if block_id is not None and block_id in self._cached_free:
                self._cached_free.move_to_end(block_id)

    def touch(self, block_ids: Sequence[int]) -> None:
        """Increment the reference counts of cached blocks that another sequence shares."""
        for block_id in block_ids:
            self._cached_free.pop(block_id, None)
            self._ref_counts[block_id] += 1

    def cache_full_blocks(self, block_ids: Sequence[int], block_hashes: Sequence[bytes]) -> None:
        """Make full blocks available to other sequences.

        A block whose tokens are cached already, in another block, is not cached twice.
        """
        for block_id, block_hash in zip(block_ids, block_hashes, strict=True):
            if block_hash not in self._block_of_hash and block_id not in self._hash_of_block:
                self._block_of_hash[block_hash] = block_id
                self._hash_of_block[block_id] = block_hash

    def uncache(self, block_ids: Iterable[int]) -> None:
        """Remove blocks that are in use from the prefix cache."""
        for block_id in block_ids:
            block_hash = self._hash_of_block.pop(block_id, None)
            if block_hash is not None:
                del self._block_of_hash[block_hash]

    def free(self, block_ids: Sequence[int]) -> None:
        """Decrement reference counts; the last blocks of a sequence are evicted first."""
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] -= 1
            assert self._ref_counts[block_id] >= 0, f"block {block_id} was freed twice"
            if self._ref_counts[block_id] == 0:
                if block_id in self._hash_of_block:
                    self._cached_free[block_id] = None
                else:
                    self._uncached_free.append(block_id)

    def reset_prefix_cache(self) -> None:
        """Drop all cached blocks; blocks in use stay allocated."""
        self._uncached_free.extend(self._cached_free)
        self._cached_free.clear()
        self._hash_of_block.clear()
        self._block_of_hash.clear()

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that these sequences' blocks are in use, and every other block is free once."""
        used: dict[int, int] = {}
        for table in tables:
            for block_id in table:
                used[block_id] = used.get(block_id, 0) + 1
        assert {block_id: n for block_id, n in enumerate(self._ref_counts) if n} == used
        free = [*self._uncached_free, *self._cached_free]
        assert sorted([*free, *used]) == list(range(1, self.capacity + 1))
        assert self._block_of_hash == {key: block for block, key in self._hash_of_block.items()}
        assert self._cached_free.keys() <= self._hash_of_block.keys() <= {*free, *used}

    def _evict_lru(self) -> int:
        block_id, _ = self._cached_free.popitem(last=False)
        del self._block_of_hash[self._hash_of_block.pop(block_id)]
        return block_id
