"""Which pages each row has: a table for each group of layers, prefix sharing, and windows that let go of old pages.

Shapes: G groups, R rows, N blocks a row at most. A block is a row's piece of `block_size` tokens, a page is where it lies.
"""

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from compiled_llm.engine.block_pool import BlockPool
from compiled_llm.runtime.batches import TRASH_PAGE, Int64
from compiled_llm.runtime.memory import PageGroup
from passes.ops.paged_attention import oldest_seen

Tokens = NDArray[np.int32]


def chain(tokens: Tokens, block_size: int, keys: list[bytes]) -> list[bytes]:
    """Extend the keys of the full blocks of a sequence: each is a digest of the one before it and the block's tokens."""
    for begin, end in pairwise(range(len(keys) * block_size, len(tokens) + 1, block_size)):
        before = keys[-1] if keys else b""
        keys.append(hashlib.blake2b(before + tokens[begin:end].tobytes(), digest_size=16).digest())
    return keys


class KVCache:
    """Pages of the running rows.

    Args:
        groups: the groups of layers and their pages.
        block_size: tokens a page.
        max_num_seqs, max_blocks: R and N.

    Attributes:
        tables: [G, R, N] int32; trash where a row has no page, or no longer.
    """

    def __init__(self, groups: Sequence[PageGroup], *, block_size: int, max_num_seqs: int, max_blocks: int, sharing: bool) -> None:
        self.block_size, self._sharing = block_size, sharing
        self._windows = [group.window for group in groups]
        self.pools = [BlockPool(group.num_pages) for group in groups]
        self.tables = np.full((len(groups), max_num_seqs, max_blocks), TRASH_PAGE, np.int32)
        self._begin = np.zeros((len(groups), max_num_seqs), np.int64)  # a row holds its blocks from begin to end
        self._end = np.zeros((len(groups), max_num_seqs), np.int64)
        self._keys: list[list[bytes]] = [[] for _ in range(max_num_seqs)]
        self._registered = [0] * max_num_seqs

    @property
    def num_free(self) -> list[int]:
        """Free pages of each group."""
        return [pool.num_free for pool in self.pools]

    def admit(self, row: int, tokens: Tokens, *, margin: int, may_hit: bool) -> int | None:
        """Give an empty row the pages it shares and, where no window lets go of them, all that its tokens need.

        Args:
            tokens: the prompt; at least its last token is not taken from shared pages, since its logits are needed.
            margin: pages of each group that shall stay free.
            may_hit: whether pages may be shared.

        Returns:
            How many tokens are cached already, or None when there is no room, and nothing has changed.
        """
        keys = chain(tokens, self.block_size, []) if self._sharing else []
        num_shared = self._num_shared(keys[: (len(tokens) - 1) // self.block_size]) if may_hit else 0
        for group in range(len(self.pools)):
            self._share(group, row, keys, num_shared)
        self._keys[row], self._registered[row] = keys, num_shared
        needs = [self._needs_at_once(group, row, len(tokens)) for group in range(len(self.pools))]
        if any(need + margin > pool.num_free for need, pool in zip(needs, self.pools, strict=True)):
            self.release(row)
            return None
        for group, window in enumerate(self._windows):
            if not window:
                self._extend(group, row, len(tokens))
        return num_shared * self.block_size

    def grow(self, row: int, start: int, end: int) -> bool:
        """Before tokens `start` to `end` of a row are computed: pages for them, and none for what no window reaches from there.

        False when there is no room; the row keeps what it has.
        """
        for group in range(len(self.pools)):
            self._let_go(group, row, start)
        needs = [self._needs(group, row, end) for group in range(len(self.pools))]
        if any(need > pool.num_free for need, pool in zip(needs, self.pools, strict=True)):
            return False
        for group in range(len(self.pools)):
            self._extend(group, row, end)
        return True

    def table_index(self, groups: Int64, rows: Int64, blocks: Int64) -> Int64:
        """Where these entries of `tables` stand in the device's flat block table, which has one row more."""
        _, num_rows, num_blocks = self.tables.shape
        return (groups * (num_rows + 1) + rows) * num_blocks + blocks

    def grow_decoding(self, rows: Int64, positions: Int64) -> tuple[Int64, Int64, Int64] | None:
        """Pages for one more token of each row, at its position.

        Returns:
            Groups, rows and blocks of the entries of `tables` that changed; or None when there is no room, and no page was taken.
        """
        crossing = positions % self.block_size == 0
        rows, blocks = rows[crossing], positions[crossing] // self.block_size
        for group, window in enumerate(self._windows):
            if window:
                for row, position in zip(rows.tolist(), positions[crossing].tolist(), strict=True):
                    self._let_go(group, row, position)
        if any(len(rows) > pool.num_free for pool in self.pools):
            return None
        for group, pool in enumerate(self.pools):
            self.tables[group, rows, blocks] = pool.allocate(len(rows))
            self._end[group, rows] = blocks + 1
        num_groups = len(self.pools)
        return np.repeat(np.arange(num_groups), len(rows)), np.tile(rows, num_groups), np.tile(blocks, num_groups)

    def register(self, row: int, tokens: Tokens) -> None:
        """The row's full blocks among these tokens, which are computed by now or by the step being made, can be shared."""
        full = len(tokens) // self.block_size
        if not self._sharing or full <= self._registered[row]:
            return
        keys = chain(tokens, self.block_size, self._keys[row])
        for group, pool in enumerate(self.pools):
            for block in range(max(self._registered[row], int(self._begin[group, row])), full):
                pool.register(int(self.tables[group, row, block]), keys[block])
        self._registered[row] = full

    def withdraw(self, row: int) -> None:
        """Let no later request share the blocks of the row: what was computed in them is not to be trusted."""
        for group, pool in enumerate(self.pools):
            begin, end = int(self._begin[group, row]), int(self._end[group, row])
            pool.unregister(self.tables[group, row, begin:end].tolist())

    def release(self, row: int) -> None:
        """Give back all pages of the row."""
        for group in range(len(self.pools)):
            self._drop(group, row, int(self._end[group, row]))
            self._begin[group, row] = self._end[group, row] = 0
        self._keys[row], self._registered[row] = [], 0

    def forget(self) -> None:
        """Share nothing of what was computed so far with requests to come."""
        for pool in self.pools:
            pool.forget()

    def check(self) -> None:
        """Assert that no page has leaked or has two owners that do not share it."""
        for group, pool in enumerate(self.pools):
            held = zip(self.tables[group], self._begin[group].tolist(), self._end[group].tolist(), strict=True)
            pool.check([table[begin:end].tolist() for table, begin, end in held])

    def _num_shared(self, keys: list[bytes]) -> int:
        """How many blocks from the beginning every group has, or has as far back as its window needs them."""
        for count in range(len(keys), 0, -1):
            needed = [keys[self._first_needed(window, count * self.block_size) : count] for window in self._windows]
            if all(pool.find(key) is not None for pool, wanted in zip(self.pools, needed, strict=True) for key in reversed(wanted)):
                return count
        return 0

    def _share(self, group: int, row: int, keys: list[bytes], count: int) -> None:
        pool, begin = self.pools[group], self._first_needed(self._windows[group], count * self.block_size)
        for block in range(begin, count):
            page = pool.find(keys[block])
            assert page is not None
            pool.share(page)
            self.tables[group, row, block] = page
        self._begin[group, row], self._end[group, row] = begin, count

    def _first_needed(self, window: int, position: int) -> int:
        """The first block that a query at the position sees."""
        return max(0, oldest_seen(position, window)) // self.block_size

    def _needs(self, group: int, row: int, end: int) -> int:
        """How many more pages the row needs for its tokens up to `end`."""
        return max(0, -(-end // self.block_size) - int(self._end[group, row]))

    def _needs_at_once(self, group: int, row: int, end: int) -> int:
        """The same where a window lets go of pages on the way: it holds so many at a time, those it has included."""
        needs, window = self._needs(group, row, end), self._windows[group]
        held = int(self._end[group, row] - self._begin[group, row])
        return min(needs, abs(window) // self.block_size + 2 - held) if window else needs

    def _extend(self, group: int, row: int, end: int) -> None:
        old, new = int(self._end[group, row]), -(-end // self.block_size)
        if new > old:
            self.tables[group, row, old:new] = self.pools[group].allocate(new - old)
            self._end[group, row] = new

    def _let_go(self, group: int, row: int, position: int) -> None:
        """Give back what the window does not reach from this position on."""
        if self._windows[group]:
            self._drop(group, row, self._first_needed(self._windows[group], position))

    def _drop(self, group: int, row: int, before: int) -> None:
        begin = int(self._begin[group, row])
        if before > begin:
            self.pools[group].release(self.tables[group, row, begin:before].tolist())
            self.tables[group, row, begin:before] = TRASH_PAGE
            self._begin[group, row] = before
