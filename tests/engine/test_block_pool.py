"""Random operations on the block pool, compared with a simple model of it."""

import copy
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from compiled_llm.engine.block_pool import BlockPool

NUM_ROWS, BLOCK_SIZE, MAX_BLOCKS = 3, 2, 10
LONGEST = MAX_BLOCKS * BLOCK_SIZE - 1
machine_settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


class PoolMachine(RuleBasedStateMachine):
    """Sequences whose blocks are allocated, shared, cached and freed."""

    @initialize(num_blocks=st.integers(2, 9))
    def make(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.all = set(range(1, num_blocks))
        self.sequences: list[list[int]] = []
        self.keys: dict[int, bytes] = {}
        self.kept: list[int] = []  # least recently used first

    @property
    def held(self) -> Counter[int]:
        return Counter(block_id for sequence in self.sequences for block_id in sequence)

    @property
    def blank(self) -> set[int]:
        return self.all - {*self.held, *self.kept}

    @rule(share_of_free=st.floats(0, 1))
    def allocate(self, share_of_free: float) -> None:
        free, blank = {*self.blank, *self.kept}, self.blank
        count = round(share_of_free * len(free))
        block_ids = self.pool.allocate(count)
        assert len(set(block_ids)) == count
        assert set(block_ids) <= free
        evicted = self.kept[: max(0, count - len(blank))]
        assert set(block_ids) - blank == set(evicted)
        self.kept = self.kept[len(evicted) :]
        for block_id in evicted:
            del self.keys[block_id]
        self.sequences.append(block_ids)

    @rule()
    def allocate_too_many(self) -> None:
        with pytest.raises(AssertionError, match="free"):
            self.pool.allocate(self.pool.num_free_blocks + 1)

    @precondition(lambda self: self.keys)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block_ids = data.draw(st.lists(st.sampled_from(sorted(self.keys)), unique=True))
        for block_id in block_ids:
            assert self.pool.get_cached_block(self.keys[block_id]) == block_id
            self.pool.touch([block_id])
        self.kept = [block_id for block_id in self.kept if block_id not in block_ids]
        self.sequences.append(block_ids)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), numbers=st.lists(st.integers(0, 12), min_size=1, max_size=4))
    def register(self, data: st.DataObject, numbers: list[int]) -> None:
        for key in map(bytes, zip(numbers, strict=True)):
            block_id = data.draw(st.sampled_from(sorted(self.held)))
            self.pool.cache_full_blocks([block_id], [key])
            if block_id not in self.keys and key not in self.keys.values():
                self.keys[block_id] = key

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block_ids = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        self.pool.free(block_ids)
        left = self.held
        self.kept += [
            block_id
            for block_id in reversed(block_ids)
            if block_id in self.keys and not left[block_id]
        ]
        if block_ids and not left[block_ids[0]]:
            with pytest.raises(AssertionError, match="twice"):
                copy.deepcopy(self.pool).free(block_ids)

    @rule(numbers=st.lists(st.integers(0, 12), unique=True))
    def touch(self, numbers: list[int]) -> None:
        keys = [bytes([number]) for number in numbers]
        block_ids = {key: block_id for block_id, key in self.keys.items()}
        self.pool.mark_recently_used(keys)
        touched = [block_ids[key] for key in reversed(keys) if block_ids.get(key) in self.kept]
        self.kept = [block_id for block_id in self.kept if block_id not in touched] + touched
        found = [key in block_ids for key in keys]
        assert self.pool.num_cached(keys) == (found.index(False) if False in found else len(keys))
        known = [key for key in keys if key in block_ids]
        assert self.pool.num_cached_free(known) == sum(block_ids[key] in self.kept for key in known)

    @rule()
    def reset_prefix_cache(self) -> None:
        self.pool.reset_prefix_cache()
        self.keys, self.kept = {}, []

    @invariant()
    def agree(self) -> None:
        self.pool.check(self.sequences)
        assert self.pool.num_free_blocks == len(self.all) - len(self.held)
        assert (
            copy.deepcopy(self.pool).allocate(self.pool.num_free_blocks)[len(self.blank) :]
            == self.kept
        )
        block_ids = {bytes([key]): self.pool.get_cached_block(bytes([key])) for key in range(13)}
        assert {
            block_id: key for key, block_id in block_ids.items() if block_id is not None
        } == self.keys


TestBlockPool = PoolMachine.TestCase
TestBlockPool.settings = machine_settings
