"""Which pages each row has: a table for each group of layers, prefix sharing, and windows that let go of old pages.

Shapes: G groups, R rows, N blocks a row at most. A block is a row's piece of `block_size` tokens, a page is where it lies.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from compiled_llm.engine.block_pool import BlockPool
from compiled_llm.runtime.memory.kv_cache import KVCacheGroup
from compiled_llm.runtime.step.batch_inputs import TRASH_PAGE, Int64
from passes.attention_reach import AttentionReach

Tokens = NDArray[np.int32]


def chain(tokens: Tokens, block_size: int, keys: list[bytes]) -> list[bytes]:
    """Extend the keys of the full blocks of a sequence: each is a digest of the one before it and the block's tokens."""
    for begin, end in pairwise(range(len(keys) * block_size, len(tokens) + 1, block_size)):
        before = keys[-1] if keys else b""
        keys.append(hashlib.blake2b(before + tokens[begin:end].tobytes(), digest_size=16).digest())
    return keys


@dataclass(slots=True, kw_only=True)
class Candidate:
    """A sequence that waits to be admitted.

    Attributes:
        num_tokens: of the prompt.
        keys: of its full blocks (see `chain`).
        sharable: keys of the blocks that may be shared: not the last token's, since its logits are needed.
        num_shared: blocks that the last attempt found.
        needs: free pages of each group that it would have taken, shared ones that nobody holds included.
    """

    num_tokens: int
    keys: list[bytes]
    sharable: frozenset[bytes]
    num_shared: int = 0
    needs: list[int] = field(default_factory=list)


class KVCacheManager:
    """Pages of the running rows.

    Args:
        groups: the groups of layers and their pages.
        block_size: tokens a page.
        max_num_seqs, max_blocks: R and N.

    Attributes:
        tables: [G, R, N] int32; trash where a row has no page, or no longer.
    """

    def __init__(
        self,
        groups: Sequence[KVCacheGroup],
        *,
        block_size: int,
        max_num_seqs: int,
        max_blocks: int,
        sharing: bool,
    ) -> None:
        self.block_size, self._sharing = block_size, sharing
        self._reaches = [group.reach for group in groups]
        self.pools = [BlockPool(group.num_pages) for group in groups]
        self.tables = np.full((len(groups), max_num_seqs, max_blocks), TRASH_PAGE, np.int32)
        self._begin = np.zeros(
            (len(groups), max_num_seqs), np.int64
        )  # a row holds its blocks from begin to end
        self._end = np.zeros((len(groups), max_num_seqs), np.int64)
        self._keys: list[list[bytes]] = [[] for _ in range(max_num_seqs)]
        self._registered = [0] * max_num_seqs
        self._refused: Candidate | None = (
            None  # the last candidate, when nothing that lowers its needs has happened since
        )

    @property
    def num_free(self) -> list[int]:
        """Free pages of each group."""
        return [pool.num_free for pool in self.pools]

    def candidate(self, tokens: Tokens, *, may_hit: bool) -> Candidate:
        """Hash a prompt's blocks, once for all attempts to admit it; `may_hit` says whether it may share pages."""
        keys = chain(tokens, self.block_size, []) if self._sharing else []
        most_shared = (len(tokens) - 1) // self.block_size if may_hit else 0
        return Candidate(num_tokens=len(tokens), keys=keys, sharable=frozenset(keys[:most_shared]))

    def admit(self, row: int, candidate: Candidate, *, margin: int) -> int | None:
        """Give an empty row the pages it shares and, where no window lets go of them, all that its tokens need.

        Args:
            candidate: the prompt.
            margin: pages of each group that shall stay free.

        Returns:
            How many tokens are cached already, or None when there is no room, and nothing has changed.
        """
        if candidate is self._refused and not self._suffices(candidate.needs, margin):
            self._touch(candidate, windowed=True)
            return None
        keys, length = candidate.keys, candidate.num_tokens
        shared = self._num_shared(keys[: len(candidate.sharable)])
        candidate.needs = [
            self._needs_to_admit(group, keys, shared, length) for group in range(len(self.pools))
        ]
        if not self._suffices(candidate.needs, margin):
            candidate.num_shared, self._refused = shared, candidate
            self._touch(candidate, windowed=False)
            self._touch(candidate, windowed=True)
            return None
        self._refused = None
        self._keys[row], self._registered[row] = keys, shared
        for group, reach in enumerate(self._reaches):
            self._share(group, row, keys, shared)
            if reach.is_full:
                self._extend(group, row, length)
        return shared * self.block_size

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
        for group, reach in enumerate(self._reaches):
            if not reach.is_full:
                for row, position in zip(rows.tolist(), positions[crossing].tolist(), strict=True):
                    self._let_go(group, row, position)
        if any(len(rows) > pool.num_free for pool in self.pools):
            return None
        for group, pool in enumerate(self.pools):
            self.tables[group, rows, blocks] = pool.allocate(len(rows))
            self._end[group, rows] = blocks + 1
        num_groups = len(self.pools)
        return (
            np.repeat(np.arange(num_groups), len(rows)),
            np.tile(rows, num_groups),
            np.tile(blocks, num_groups),
        )

    def register(self, row: int, tokens: Tokens) -> None:
        """The row's full blocks among these tokens, which are computed by now or by the step being made, can be shared."""
        full = len(tokens) // self.block_size
        if not self._sharing or full <= self._registered[row]:
            return
        keys = chain(tokens, self.block_size, self._keys[row])
        if self._refused is not None and not self._refused.sharable.isdisjoint(
            keys[self._registered[row] : full]
        ):
            self._refused = None
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
            held = zip(
                self.tables[group],
                self._begin[group].tolist(),
                self._end[group].tolist(),
                strict=True,
            )
            pool.check([table[begin:end].tolist() for table, begin, end in held])

    def _num_shared(self, keys: list[bytes]) -> int:
        """How many blocks from the beginning every group has, or has as far back as its window needs them.

        No key is looked up twice in a group, so this takes time in proportion to the keys.
        """
        count = len(keys)
        for pool, reach in zip(self.pools, self._reaches, strict=True):
            if reach.is_full:
                count = pool.num_found(keys[:count])
        begins = [
            0 if reach.is_full else count for reach in self._reaches
        ]  # each group has the blocks from here to `count`
        group = 0
        while count and group < len(begins):
            needed = range(
                self._first_needed(self._reaches[group], count * self.block_size),
                min(begins[group], count),
            )
            missing = next(
                (
                    block
                    for block in reversed(needed)
                    if self.pools[group].find(keys[block]) is None
                ),
                None,
            )
            if missing is None:
                begins[group], group = min(begins[group], needed.start), group + 1
            else:  # nor does what is needed of any count from there up to this one stand
                begins[group], count, group = missing, missing, 0
        return count

    def _touch(self, candidate: Candidate, *, windowed: bool) -> None:
        """Keep the blocks that the next attempt may share: few of them where there is a window, whose pages change hands often."""
        count = candidate.num_shared
        for pool, reach in zip(self.pools, self._reaches, strict=True):
            if reach.is_full != windowed:
                pool.touch(
                    candidate.keys[self._first_needed(reach, count * self.block_size) : count]
                )

    def _suffices(self, needs: list[int], margin: int) -> bool:
        return all(
            need + margin <= pool.num_free for need, pool in zip(needs, self.pools, strict=True)
        )

    def _share(self, group: int, row: int, keys: list[bytes], count: int) -> None:
        pool, begin = (
            self.pools[group],
            self._first_needed(self._reaches[group], count * self.block_size),
        )
        for block in range(begin, count):
            page = pool.find(keys[block])
            assert page is not None
            pool.share(page)
            self.tables[group, row, block] = page
        self._begin[group, row], self._end[group, row] = begin, count

    def _first_needed(self, reach: AttentionReach, position: int) -> int:
        """The first block that a query at the position sees."""
        return max(0, reach.first_visible(position)) // self.block_size

    def _needs(self, group: int, row: int, end: int) -> int:
        """How many more pages the row needs for its tokens up to `end`."""
        return max(0, -(-end // self.block_size) - int(self._end[group, row]))

    def _needs_to_admit(self, group: int, keys: list[bytes], num_shared: int, end: int) -> int:
        """How many free pages a new row takes for its tokens up to `end`, with so many blocks shared.

        Where a window lets go of pages on the way, it holds so many at a time, the shared ones included.
        """
        reach, needs = self._reaches[group], -(-end // self.block_size) - num_shared
        begin = self._first_needed(reach, num_shared * self.block_size)
        if not reach.is_full:
            needs = min(needs, reach.size // self.block_size + 2 - (num_shared - begin))
        return needs + self.pools[group].num_idle(keys[begin:num_shared])

    def _extend(self, group: int, row: int, end: int) -> None:
        old, new = int(self._end[group, row]), -(-end // self.block_size)
        if new > old:
            self.tables[group, row, old:new] = self.pools[group].allocate(new - old)
            self._end[group, row] = new

    def _let_go(self, group: int, row: int, position: int) -> None:
        """Give back what the window does not reach from this position on."""
        if not self._reaches[group].is_full:
            self._drop(group, row, self._first_needed(self._reaches[group], position))

    def _drop(self, group: int, row: int, before: int) -> None:
        begin = int(self._begin[group, row])
        if before > begin:
            self.pools[group].release(self.tables[group, row, begin:before].tolist())
            self.tables[group, row, begin:before] = TRASH_PAGE
            self._begin[group, row] = before
