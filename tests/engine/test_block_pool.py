"""Pages: who holds them, who may share them, and which are handed out again first. Random operations against plain models."""

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from compiled_llm.engine.block_pool import BlockPool
from compiled_llm.engine.kv_cache_manager import Candidate, Int64, KVCacheManager
from compiled_llm.runtime.memory.kv_cache import KVCacheGroup
from compiled_llm.runtime.step.batch_inputs import TRASH_PAGE
from passes.attention_reach import AttentionReach

NUM_ROWS, BLOCK_SIZE, MAX_BLOCKS = 3, 2, 10
LONGEST = MAX_BLOCKS * BLOCK_SIZE - 1
machine_settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


class PoolMachine(RuleBasedStateMachine):
    """Sequences of pages that are taken, shared, registered and given back."""

    @initialize(num_pages=st.integers(2, 9))
    def make(self, num_pages: int) -> None:
        self.pool = BlockPool(num_pages)
        self.all = set(range(1, num_pages))
        self.sequences: list[list[int]] = []
        self.keys: dict[int, bytes] = {}
        self.kept: list[int] = []  # least recently used first

    @property
    def held(self) -> Counter[int]:
        return Counter(page for sequence in self.sequences for page in sequence)

    @property
    def blank(self) -> set[int]:
        return self.all - {*self.held, *self.kept}

    @rule(share_of_free=st.floats(0, 1))
    def allocate(self, share_of_free: float) -> None:
        free, blank = {*self.blank, *self.kept}, self.blank
        count = round(share_of_free * len(free))
        pages = self.pool.allocate(count)
        assert len(set(pages)) == count
        assert set(pages) <= free
        evicted = self.kept[: max(0, count - len(blank))]
        assert set(pages) - blank == set(evicted)
        self.kept = self.kept[len(evicted) :]
        for page in evicted:
            del self.keys[page]
        self.sequences.append(pages)

    @rule()
    def allocate_too_many(self) -> None:
        with pytest.raises(AssertionError, match="free"):
            self.pool.allocate(self.pool.num_free + 1)

    @precondition(lambda self: self.keys)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        pages = data.draw(st.lists(st.sampled_from(sorted(self.keys)), unique=True))
        for page in pages:
            assert self.pool.find(self.keys[page]) == page
            self.pool.share(page)
        self.kept = [page for page in self.kept if page not in pages]
        self.sequences.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), numbers=st.lists(st.integers(0, 12), min_size=1, max_size=4))
    def register(self, data: st.DataObject, numbers: list[int]) -> None:
        for key in map(bytes, zip(numbers, strict=True)):
            page = data.draw(st.sampled_from(sorted(self.held)))
            self.pool.register(page, key)
            if page not in self.keys and key not in self.keys.values():
                self.keys[page] = key

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        self.pool.release(pages)
        left = self.held
        self.kept += [page for page in reversed(pages) if page in self.keys and not left[page]]
        if pages and not left[pages[0]]:
            with pytest.raises(AssertionError, match="twice"):
                copy.deepcopy(self.pool).release(pages)

    @rule(numbers=st.lists(st.integers(0, 12), unique=True))
    def touch(self, numbers: list[int]) -> None:
        keys = [bytes([number]) for number in numbers]
        pages = {key: page for page, key in self.keys.items()}
        self.pool.touch(keys)
        touched = [pages[key] for key in reversed(keys) if pages.get(key) in self.kept]
        self.kept = [page for page in self.kept if page not in touched] + touched
        found = [key in pages for key in keys]
        assert self.pool.num_found(keys) == (found.index(False) if False in found else len(keys))
        known = [key for key in keys if key in pages]
        assert self.pool.num_idle(known) == sum(pages[key] in self.kept for key in known)

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.keys, self.kept = {}, []

    @invariant()
    def agree(self) -> None:
        self.pool.check(self.sequences)
        assert self.pool.num_free == len(self.all) - len(self.held)
        assert copy.deepcopy(self.pool).allocate(self.pool.num_free)[len(self.blank) :] == self.kept
        pages = {bytes([key]): self.pool.find(bytes([key])) for key in range(13)}
        assert {page: key for key, page in pages.items() if page is not None} == self.keys


def _first_seen(window: int, position: int) -> int:
    """The first block that a query at the position sees."""
    return max(0, position - window + 1) // BLOCK_SIZE if window else 0


def _pages_of_a_sequence(window: int) -> int:
    return min(MAX_BLOCKS, window // BLOCK_SIZE + 4) if window else MAX_BLOCKS


class CacheMachine(RuleBasedStateMachine):
    """Rows that are filled, in chunks and then one token at a time, and emptied.

    tokens, computed, registered: of each row that somebody has, its tokens, how many are computed, and full blocks dealt with.
    contents: of each group, the sequence that ends with a registered page.
    waiting: the tokens of a sequence for which there was no room, whether it may share, and what the cache knows of it.
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
            sharing=sharing,
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
        """How many tokens of a prompt can be shared."""
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
        """Pages that came into a table since: what they held before is gone, unless they are shared."""
        for group, row, block in np.argwhere(self.cache.tables != before).tolist():
            page = int(self.cache.tables[group, row, block])
            if page != TRASH_PAGE and block * BLOCK_SIZE >= self.computed[row]:
                self.contents[group].pop(page, None)

    def still_seen(self) -> list[list[int]]:
        """Of each group and row, the pages that the next query sees."""
        return [
            table[
                row, _first_seen(window, self.computed[row]) : -(-self.computed[row] // BLOCK_SIZE)
            ].tolist()
            for window, table in zip(self.windows, self.cache.tables, strict=True)
            for row in sorted(self.tokens)
        ]

    @precondition(lambda self: len(self.tokens) < NUM_ROWS)
    @rule(
        tokens=st.lists(st.sampled_from([1, 1, 1, 2]), min_size=1, max_size=LONGEST)
        | st.integers(1, LONGEST).map(lambda n: [1] * n),
        margin=st.integers(0, 2),
        may_hit=st.sampled_from([True, True, True, False]),
    )
    def admit(self, tokens: list[int], margin: int, may_hit: bool) -> None:
        self.try_to_admit(
            tokens,
            margin,
            may_hit,
            self.cache.candidate(np.array(tokens, np.int32), may_hit=may_hit),
        )

    @precondition(lambda self: self.waiting is not None and len(self.tokens) < NUM_ROWS)
    @rule(margin=st.integers(0, 2))
    def admit_later(self, margin: int) -> None:
        assert self.waiting is not None
        tokens, may_hit, candidate = self.waiting
        anew = copy.deepcopy(self.cache)
        self.try_to_admit(tokens, margin, may_hit, candidate)
        if self.waiting is not None and not any(self.windows):
            row = min(set(range(NUM_ROWS)) - set(self.tokens))
            assert (
                anew.admit(
                    row, anew.candidate(np.array(tokens, np.int32), may_hit=may_hit), margin=margin
                )
                is None
            )

    def try_to_admit(
        self, tokens: list[int], margin: int, may_hit: bool, candidate: Candidate
    ) -> None:
        row = min(set(range(NUM_ROWS)) - set(self.tokens))
        before, free = self.cache.tables.copy(), self.cache.num_free
        cached = self.cache.admit(row, candidate, margin=margin)
        self.waiting = (tokens, may_hit, candidate) if cached is None else None
        if cached is None:
            assert self.tokens or margin, "a request cannot be served though it is alone"
            assert (self.cache.tables == before).all()
            assert self.cache.num_free == free
            return
        assert cached == (self.cached(tokens) if self.sharing and may_hit else 0)
        assert all(count >= margin for count in self.cache.num_free)
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
        if not self.cache.grow(row, start, end):
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
        changed = self.cache.grow_decoding(rows, positions)
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
        self.cache.register(row, np.array(self.tokens[row][: self.computed[row]], np.int32))
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
            self.cache.release(row)
            del self.tokens[row], self.computed[row], self.registered[row]
            assert (self.cache.tables[:, row] == TRASH_PAGE).all()

    @rule()
    def forget(self) -> None:
        self.cache.forget()
        self.contents = [{} for _ in self.windows]

    def check_alone(self, row: int, start: int) -> None:
        """Nobody else has the pages that a row is about to write from this position on."""
        for group, table in enumerate(self.cache.tables):
            written = table[row, start // BLOCK_SIZE : -(-self.computed[row] // BLOCK_SIZE)]
            assert (written != TRASH_PAGE).all()
            assert not np.isin(np.delete(table, row, axis=0), written).any()
            assert not set(written.tolist()) & self.contents[group].keys()

    @invariant()
    def pages_are_whose_they_should_be(self) -> None:
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
            self.cache.release(row)
        assert self.cache.num_free == [pool.capacity for pool in self.cache.pools]
        self.cache.check()


TestBlockPool = PoolMachine.TestCase
TestBlockPool.settings = machine_settings
TestKVCache = CacheMachine.TestCase
TestKVCache.settings = machine_settings
