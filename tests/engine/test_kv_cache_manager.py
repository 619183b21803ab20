"""Random operations on the KV cache manager, compared with a simple model of it."""

import copy
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from compiled_llm.engine.kv_cache_manager import Candidate, Int64, KVCacheManager
from compiled_llm.runtime.memory.kv_cache import KVCacheGroup
from compiled_llm.runtime.step.batch_inputs import TRASH_PAGE
from passes.attention_reach import AttentionReach

NUM_ROWS, BLOCK_SIZE, MAX_BLOCKS = 3, 2, 10
LONGEST = MAX_BLOCKS * BLOCK_SIZE - 1
machine_settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


def _first_seen(window: int, position: int) -> int:
    """Return the first block that a query at the position attends to."""
    return max(0, position - window + 1) // BLOCK_SIZE if window else 0


def _pages_of_a_sequence(window: int) -> int:
    return min(MAX_BLOCKS, window // BLOCK_SIZE + 4) if window else MAX_BLOCKS


class _CacheModel(RuleBasedStateMachine):
    """A KV cache manager, and a simple model of what its rows hold.

    tokens, computed, registered: for each used row, its tokens, the number of computed ones, and
        the number of full blocks that were cached.
    contents: for each group, the tokens up to the end of each cached block.
    waiting: tokens of a sequence that was refused, whether it may share, and its candidate.
    """

    @initialize(
        windows=st.sampled_from([[0], [0, 5], [4, 0], [8], [3, 6]]),
        spare=st.lists(st.integers(0, 8), min_size=2, max_size=2),
        sharing=st.sampled_from([True, True, True, False]),
    )
    def make(self, windows: list[int], spare: list[int], sharing: bool) -> None:
        sizes = [
            1 + _pages_of_a_sequence(window) + more
            for window, more in zip(windows, spare, strict=False)
        ]
        groups = [
            KVCacheGroup(reach=AttentionReach.decode(w), layers=(n,), num_pages=size)
            for n, (w, size) in enumerate(zip(windows, sizes, strict=True))
        ]
        self.cache = KVCacheManager(
            groups,
            block_size=BLOCK_SIZE,
            max_num_seqs=NUM_ROWS,
            max_blocks=MAX_BLOCKS,
            prefix_caching=sharing,
        )
        self.windows, self.sharing = windows, sharing
        self.tokens: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.registered: dict[int, int] = {}
        self.contents: list[dict[int, tuple[int, ...]]] = [{} for _ in windows]
        self.waiting: tuple[list[int], bool, Candidate] | None = None

    @property
    def decoding(self) -> list[int]:
        return [
            row
            for row, tokens in sorted(self.tokens.items())
            if self.computed[row] == len(tokens) < MAX_BLOCKS * BLOCK_SIZE
        ]

    @property
    def prefilling(self) -> list[int]:
        return [
            row for row, tokens in sorted(self.tokens.items()) if self.computed[row] < len(tokens)
        ]

    def cached(self, tokens: list[int]) -> int:
        """Return how many tokens of a prompt can be shared."""
        for count in range((len(tokens) - 1) // BLOCK_SIZE, 0, -1):
            ends = [
                range(_first_seen(window, count * BLOCK_SIZE), count) for window in self.windows
            ]
            if all(
                tuple(tokens[: (block + 1) * BLOCK_SIZE]) in contents.values()
                for blocks, contents in zip(ends, self.contents, strict=True)
                for block in blocks
            ):
                return count * BLOCK_SIZE
        return 0

    def took(self, before: Int64) -> None:
        """Forget the former content of blocks that were allocated since, unless they are shared."""
        for group, row, block in np.argwhere(self.cache.tables != before).tolist():
            page = int(self.cache.tables[group, row, block])
            if page != TRASH_PAGE and block * BLOCK_SIZE >= self.computed[row]:
                self.contents[group].pop(page, None)

    def still_seen(self) -> list[list[int]]:
        """Return for each group and row the blocks that the next query attends to."""
        return [
            table[
                row, _first_seen(window, self.computed[row]) : -(-self.computed[row] // BLOCK_SIZE)
            ].tolist()
            for window, table in zip(self.windows, self.cache.tables, strict=True)
            for row in sorted(self.tokens)
        ]

    def check_alone(self, row: int, start: int) -> None:
        """Assert that no other row has the blocks that a row writes from this position on."""
        for group, table in enumerate(self.cache.tables):
            written = table[row, start // BLOCK_SIZE : -(-self.computed[row] // BLOCK_SIZE)]
            assert (written != TRASH_PAGE).all()
            assert not np.isin(np.delete(table, row, axis=0), written).any()
            assert not set(written.tolist()) & self.contents[group].keys()

    @invariant()
    def blocks_belong_to_their_rows(self) -> None:
        self.cache.check()
        assert all(TRASH_PAGE not in pages for pages in self.still_seen())
        for table in self.cache.tables:
            holders: dict[int, Any] = {}
            for row, block in np.argwhere(table != TRASH_PAGE).tolist():
                content = self.tokens[row][: (block + 1) * BLOCK_SIZE]
                assert holders.setdefault(int(table[row, block]), (block, content)) == (
                    block,
                    content,
                )

    def teardown(self) -> None:
        for row in list(self.tokens):
            self.cache.free(row)
        assert self.cache.num_free_blocks == [group.pool.capacity for group in self.cache.groups]
        self.cache.check()


class CacheMachine(_CacheModel):
    """Rows that are filled, in chunks and then one token at a time, and freed."""

    @precondition(lambda self: len(self.tokens) < NUM_ROWS)
    @rule(
        tokens=st.lists(st.sampled_from([1, 1, 1, 2]), min_size=1, max_size=LONGEST)
        | st.integers(1, LONGEST).map(lambda n: [1] * n),
        margin=st.integers(0, 2),
        may_share=st.sampled_from([True, True, True, False]),
    )
    def admit(self, tokens: list[int], margin: int, may_share: bool) -> None:
        self.try_to_admit(
            tokens,
            margin,
            may_share,
            self.cache.candidate(np.array(tokens, np.int32), may_share=may_share),
        )

    @precondition(lambda self: self.waiting is not None and len(self.tokens) < NUM_ROWS)
    @rule(margin=st.integers(0, 2))
    def admit_later(self, margin: int) -> None:
        assert self.waiting is not None
        tokens, may_share, candidate = self.waiting
        anew = copy.deepcopy(self.cache)
        self.try_to_admit(tokens, margin, may_share, candidate)
        if self.waiting is not None and not any(self.windows):
            row = min(set(range(NUM_ROWS)) - set(self.tokens))
            assert (
                anew.admit(
                    row,
                    anew.candidate(np.array(tokens, np.int32), may_share=may_share),
                    margin=margin,
                )
                is None
            )

    def try_to_admit(
        self, tokens: list[int], margin: int, may_share: bool, candidate: Candidate
    ) -> None:
        row = min(set(range(NUM_ROWS)) - set(self.tokens))
        before, free = self.cache.tables.copy(), self.cache.num_free_blocks
        cached = self.cache.admit(row, candidate, margin=margin)
        self.waiting = (tokens, may_share, candidate) if cached is None else None
        if cached is None:
            assert self.tokens or margin, "a request cannot be served though it is alone"
            assert (self.cache.tables == before).all()
            assert self.cache.num_free_blocks == free
            return
        assert cached == (self.cached(tokens) if self.sharing and may_share else 0)
        assert all(count >= margin for count in self.cache.num_free_blocks)
        self.tokens[row], self.computed[row], self.registered[row] = (
            tokens,
            cached,
            cached // BLOCK_SIZE,
        )
        for window, table, contents in zip(
            self.windows, self.cache.tables, self.contents, strict=True
        ):
            for block in range(_first_seen(window, cached), cached // BLOCK_SIZE):
                assert contents[int(table[row, block])] == tuple(tokens[: (block + 1) * BLOCK_SIZE])
        self.took(before)

    @precondition(lambda self: self.prefilling)
    @rule(data=st.data(), count=st.integers(1, 2 * BLOCK_SIZE), register=st.booleans())
    def grow(self, data: st.DataObject, count: int, register: bool) -> None:
        row = data.draw(st.sampled_from(self.prefilling))
        start, end = self.computed[row], min(self.computed[row] + count, len(self.tokens[row]))
        before, seen = self.cache.tables.copy(), self.still_seen()
        if not self.cache.allocate_slots(row, start, end):
            assert len(self.tokens) > 1, "a chunk cannot be computed though its row is alone"
            assert self.still_seen() == seen
            return
        self.took(before)
        self.computed[row] = end
        self.check_alone(row, start)
        if register:
            self.register(row)

    @precondition(lambda self: self.decoding)
    @rule(data=st.data(), register=st.booleans())
    def decode(self, data: st.DataObject, register: bool) -> None:
        chosen = data.draw(
            st.lists(st.sampled_from(self.decoding), unique=True, min_size=1).map(sorted)
        )
        rows, positions = np.array(chosen), np.array([self.computed[row] for row in chosen])
        before, seen = self.cache.tables.copy(), self.still_seen()
        changed = self.cache.allocate_decode_slots(rows, positions)
        if changed is None:
            assert len(self.tokens) > 1, "a token cannot be computed though its row is alone"
            assert self.still_seen() == seen
            return
        new = np.argwhere((self.cache.tables != before) & (self.cache.tables != TRASH_PAGE))
        assert sorted(map(tuple, new.tolist())) == sorted(
            zip(*(part.tolist() for part in changed), strict=True)
        )
        self.took(before)
        for row in chosen:
            self.tokens[row].append(data.draw(st.sampled_from([1, 1, 1, 2])))
            self.computed[row] += 1
            self.check_alone(row, self.computed[row] - 1)
            if register:
                self.register(row)

    def register(self, row: int) -> None:
        self.cache.cache_full_blocks(
            row, np.array(self.tokens[row][: self.computed[row]], np.int32)
        )
        blocks = range(self.registered[row], self.computed[row] // BLOCK_SIZE)
        for table, contents in zip(
            self.cache.tables if self.sharing else [], self.contents, strict=False
        ):
            for block in blocks:
                page, content = (
                    int(table[row, block]),
                    tuple(self.tokens[row][: (block + 1) * BLOCK_SIZE]),
                )
                if page != TRASH_PAGE and content not in contents.values():
                    contents[page] = content
        self.registered[row] = max(self.registered[row], blocks.stop)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        for row in data.draw(
            st.lists(st.sampled_from(sorted(self.tokens)), unique=True, min_size=1)
        ):
            self.cache.free(row)
            del self.tokens[row], self.computed[row], self.registered[row]
            assert (self.cache.tables[:, row] == TRASH_PAGE).all()

    @rule()
    def forget(self) -> None:
        self.cache.reset_prefix_cache()
        self.contents = [{} for _ in self.windows]


TestKVCacheManager = CacheMachine.TestCase
TestKVCacheManager.settings = machine_settings
