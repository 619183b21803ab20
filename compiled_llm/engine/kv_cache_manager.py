"""Block tables of the running rows: allocation, prefix sharing and windows.

Shapes: G groups of layers, R rows, N blocks of a sequence at most.
"""

from collections.abc import Sequence

import numpy as np

from compiled_llm.engine.block_table import BlockTable
from compiled_llm.engine.prefix_cache import (
    Candidate,
    Tokens,
    hash_blocks,
    longest_cached_prefix,
)
from compiled_llm.runtime.memory.kv_cache import KVCacheGroup
from compiled_llm.runtime.step.batch_inputs import TRASH_PAGE, Int64


class KVCacheManager:
    """Assigns blocks of the paged KV cache to rows.

    Args:
        groups: the groups of layers and their numbers of blocks.
        block_size: tokens of a block.
        max_num_seqs: R.
        max_blocks: N.
        prefix_caching: whether sequences share full blocks of equal prefixes.

    Attributes:
        tables: [G, R, N] int32 block ids; `TRASH_PAGE` where a row has no block.
        groups: block table and pool of each group; their arrays are views of `tables`.
    """

    def __init__(
        self,
        groups: Sequence[KVCacheGroup],
        *,
        block_size: int,
        max_num_seqs: int,
        max_blocks: int,
        prefix_caching: bool,
    ) -> None:
        self.block_size = block_size
        self._prefix_caching = prefix_caching
        self.tables = np.full((len(groups), max_num_seqs, max_blocks), TRASH_PAGE, np.int32)
        self.groups = [
            BlockTable(group, block_size=block_size, block_ids=block_ids)
            for group, block_ids in zip(groups, self.tables, strict=True)
        ]
        self._block_hashes: list[list[bytes]] = [[] for _ in range(max_num_seqs)]
        self._num_cached = [0] * max_num_seqs
        # The candidate refused last; None once something has reduced the blocks that it needs.
        self._refused: Candidate | None = None

    @property
    def num_free_blocks(self) -> list[int]:
        """Number of free blocks of each group."""
        return [group.pool.num_free_blocks for group in self.groups]

    def candidate(self, tokens: Tokens, *, may_share: bool) -> Candidate:
        """Hash a prompt's blocks, once for all attempts to admit it.

        Args:
            tokens: [T] int32.
            may_share: whether it may use cached blocks.
        """
        hashes = hash_blocks(tokens, self.block_size, []) if self._prefix_caching else []
        most_shared = (len(tokens) - 1) // self.block_size if may_share else 0
        return Candidate(
            num_tokens=len(tokens), block_hashes=hashes, sharable=frozenset(hashes[:most_shared])
        )

    def admit(self, row: int, candidate: Candidate, *, margin: int) -> int | None:
        """Give an empty row its cached blocks and, in groups without a window, all others.

        Args:
            row: a free row.
            candidate: its sequence.
            margin: blocks of each group that must stay free.

        Returns:
            The number of tokens already cached, or None, without any change, if too few blocks
            are free.
        """
        if candidate is self._refused and not self._has_free(candidate.num_needed, margin):
            self._mark_recently_used(candidate, windowed=True)
            return None
        hashes = candidate.block_hashes
        shared = longest_cached_prefix(self.groups, hashes[: len(candidate.sharable)])
        candidate.num_needed = [
            group.num_needed_to_admit(hashes, shared, candidate.num_tokens) for group in self.groups
        ]
        if not self._has_free(candidate.num_needed, margin):
            candidate.num_shared = shared
            self._refused = candidate
            self._mark_recently_used(candidate, windowed=False)
            self._mark_recently_used(candidate, windowed=True)
            return None
        self._refused = None
        self._block_hashes[row] = hashes
        self._num_cached[row] = shared
        for group in self.groups:
            group.share(row, hashes, shared)
            if group.reach.is_full:
                group.extend(row, candidate.num_tokens)
        return shared * self.block_size

    def allocate_slots(self, row: int, start: int, end: int) -> bool:
        """Allocate blocks for tokens `start` to `end` of a row, the next to be computed.

        Blocks that the window excludes from `start` on are freed first.

        Returns:
            False if too few blocks are free; the row keeps its blocks.
        """
        for group in self.groups:
            group.free_invisible(row, start)
        needed = [group.num_needed(row, end) for group in self.groups]
        if not self._has_free(needed, 0):
            return False
        for group in self.groups:
            group.extend(row, end)
        return True

    def table_index(self, groups: Int64, rows: Int64, blocks: Int64) -> Int64:
        """Return the index of entries of `tables` in the device's flat block table.

        The device's table has one row more, for padding.
        """
        _, num_rows, num_blocks = self.tables.shape
        return (groups * (num_rows + 1) + rows) * num_blocks + blocks

    def allocate_decode_slots(
        self, rows: Int64, positions: Int64
    ) -> tuple[Int64, Int64, Int64] | None:
        """Allocate blocks for one more token of each row, at its position.

        Returns:
            Groups, rows and blocks of the entries of `tables` that changed, or None, without any
            allocation, if too few blocks are free.
        """
        crossing = positions % self.block_size == 0
        rows, blocks = rows[crossing], positions[crossing] // self.block_size
        for group in self.groups:
            if not group.reach.is_full:
                for row, position in zip(rows.tolist(), positions[crossing].tolist(), strict=True):
                    group.free_invisible(row, position)
        if any(len(rows) > group.pool.num_free_blocks for group in self.groups):
            return None
        for group in self.groups:
            group.block_ids[rows, blocks] = group.pool.allocate(len(rows))
            group.end[rows] = blocks + 1
        num_groups = len(self.groups)
        return (
            np.repeat(np.arange(num_groups), len(rows)),
            np.tile(rows, num_groups),
            np.tile(blocks, num_groups),
        )

    def cache_full_blocks(self, row: int, tokens: Tokens) -> None:
        """Cache the full blocks of a row's first tokens.

        The tokens are computed already, or by the step that is being scheduled.
        """
        num_full, num_cached = len(tokens) // self.block_size, self._num_cached[row]
        if not self._prefix_caching or num_full <= num_cached:
            return
        hashes = hash_blocks(tokens, self.block_size, self._block_hashes[row])
        refused = self._refused
        if refused is not None and not refused.sharable.isdisjoint(hashes[num_cached:num_full]):
            self._refused = None
        for group in self.groups:
            group.cache_full_blocks(row, hashes, num_cached, num_full)
        self._num_cached[row] = num_full

    def uncache(self, row: int) -> None:
        """Remove the row's blocks from the prefix cache, because their content is not valid."""
        for group in self.groups:
            group.uncache(row)

    def free(self, row: int) -> None:
        """Free all blocks of the row."""
        for group in self.groups:
            group.free(row)
        self._block_hashes[row] = []
        self._num_cached[row] = 0

    def reset_prefix_cache(self) -> None:
        """Drop all cached prefix blocks."""
        for group in self.groups:
            group.pool.reset_prefix_cache()

    def check(self) -> None:
        """Assert that no block has leaked or is used twice without being shared."""
        for group in self.groups:
            group.pool.check([group.used(row) for row in range(len(group.block_ids))])

    def _mark_recently_used(self, candidate: Candidate, *, windowed: bool) -> None:
        """Keep the blocks that the next attempt may share, in groups with or without a window.

        A group with a window shares few blocks, and its free blocks are reused often.
        """
        for group in self.groups:
            if group.reach.is_full != windowed:
                group.mark_recently_used(candidate.block_hashes, candidate.num_shared)

    def _has_free(self, num_needed: list[int], margin: int) -> bool:
        return all(
            needed + margin <= group.pool.num_free_blocks
            for needed, group in zip(num_needed, self.groups, strict=True)
        )
