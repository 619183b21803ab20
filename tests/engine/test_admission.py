"""Admission of requests: order, and cost in operations, which depend on no machine."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from compiled_llm.engine import kv_cache_manager
from compiled_llm.engine.input_batch import InputBatch
from compiled_llm.engine.kv_cache_manager import KVCacheManager
from compiled_llm.engine.prefix_cache import longest_cached_prefix
from compiled_llm.engine.request import Request
from compiled_llm.engine.request_queue import RequestQueue
from compiled_llm.engine.scheduler import Scheduler
from compiled_llm.engine.scheduler_limits import SchedulerLimits
from compiled_llm.runtime.memory.kv_cache import KVCacheGroup
from compiled_llm.runtime.step.batch_inputs import PrefillBatch
from compiled_llm.sampling_params import SamplingParams
from passes.attention_reach import AttentionReach


def scheduler_of(
    num_pages: int,
    *,
    max_num_seqs: int = 4,
    windows: Sequence[int] = (0,),
    max_model_len: int = 1024,
) -> Scheduler:
    """Return a scheduler with blocks of 16 tokens and 64 tokens a step."""
    groups = [
        KVCacheGroup(reach=AttentionReach.decode(window), layers=(n,), num_pages=1 + num_pages)
        for n, window in enumerate(windows)
    ]
    cache = KVCacheManager(
        groups,
        block_size=16,
        max_num_seqs=max_num_seqs,
        max_blocks=max_model_len // 16,
        prefix_caching=True,
    )
    limits = SchedulerLimits(max_num_batched_tokens=64, prefill_sizes=[64], separate_decode=True)
    return Scheduler(InputBatch(max_num_seqs, max_model_len, vocab_size=64), cache, limits)


def request_of(length: int, priority: int = 0, **options: Any) -> Request:
    params = options.pop("sampling_params", SamplingParams())
    return Request(
        prompt_token_ids=[priority + 7] * length,
        sampling_params=params,
        priority=priority,
        max_tokens=20,
        **options,
    )


def served(scheduler: Scheduler) -> list[Request]:
    """Schedule a step, and return the requests whose tokens it computes, in order."""
    output = scheduler.schedule()
    assert output is not None
    rows = output.batch.seq_rows if isinstance(output.batch, PrefillBatch) else output.batch.rows
    return [scheduler.input_batch.request(row) for row in rows.tolist()]


def test_an_urgent_prompt_goes_before_a_long_one_that_has_begun() -> None:
    scheduler = scheduler_of(200)
    long, equal, urgent = request_of(300), request_of(40), request_of(20, priority=-1)
    scheduler.add_request(long)
    assert served(scheduler) == [long]
    scheduler.add_request(equal)
    scheduler.add_request(urgent)
    assert served(scheduler) == [urgent, long]
    assert served(scheduler)[-1] == long  # `equal` came later
    longer = request_of(100, priority=-2)
    scheduler.add_request(longer)
    assert served(scheduler)[-1] == longer
    assert set(served(scheduler)) == {urgent, longer, long}
    steps = [served(scheduler) for _ in range(3)]
    assert long in steps[0]
    assert equal in steps[-1]


@pytest.mark.parametrize("lacking", ["rows", "pages"])
def test_prompts_that_have_begun_go_on_while_an_urgent_one_cannot_be_admitted(lacking: str) -> None:
    scheduler = scheduler_of(
        25 if lacking == "pages" else 200, max_num_seqs=1 if lacking == "rows" else 4
    )
    long, urgent = request_of(300), request_of(200, priority=-1)
    scheduler.add_request(long)
    assert served(scheduler) == [long]
    scheduler.add_request(urgent)
    assert [served(scheduler) for _ in range(4)] == [[long]] * 4
    scheduler.release(scheduler.input_batch.requests.index(long))
    assert served(scheduler) == [urgent]


def test_the_urgent_prompt_of_a_model_with_states_goes_first() -> None:
    scheduler = scheduler_of(200)
    object.__setattr__(scheduler._limits, "one_sequence_prefill", True)
    long, urgent = request_of(300), request_of(20, priority=-1)
    scheduler.add_request(long)
    assert served(scheduler) == [long]
    scheduler.add_request(urgent)
    assert [served(scheduler) for _ in range(3)] == [
        [urgent],
        [urgent],
        [long],
    ]  # one decodes in between


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    """Return a list to which each later call appends the length of its last argument."""
    original, calls = getattr(owner, name), list[int]()

    def counted(*args: Any, **named: Any) -> Any:
        calls.append(len(args[-1]) if args and hasattr(args[-1], "__len__") else 1)
        return original(*args, **named)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_a_prompt_that_waits_for_pages_is_hashed_once_and_tried_when_pages_may_suffice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashed, tried = (
        count_calls(monkeypatch, kv_cache_manager, "hash_blocks"),
        count_calls(monkeypatch, kv_cache_manager, "longest_cached_prefix"),
    )
    scheduler = scheduler_of(70)
    running = [request_of(150), request_of(150, priority=1)]
    for request in running:
        scheduler.add_request(request)
    for _ in range(6):
        scheduler.schedule()
    del hashed[:], tried[:]
    waiting = request_of(1000, priority=2)
    scheduler.add_request(waiting)
    for _ in range(10):
        assert set(served(scheduler)) == set(running)
    assert (len(hashed), tried) == (1, [62])
    scheduler.release(scheduler.input_batch.requests.index(running[0]))
    for _ in range(5):
        assert served(scheduler) == [running[1]]
    assert (len(hashed), tried) == (1, [62])  # 10 pages more do not suffice
    scheduler.release(scheduler.input_batch.requests.index(running[1]))
    assert served(scheduler) == [waiting]
    assert (len(hashed), tried) == (2, [62, 62])  # the chunk's own blocks are looked up in its keys


def test_a_preempted_request_is_hashed_with_what_it_has_generated() -> None:
    scheduler = scheduler_of(70)
    request = request_of(100)
    scheduler.add_request(request)
    for _ in range(3):
        scheduler.schedule()
    row = scheduler.input_batch.requests.index(request)
    rows = np.array([row])
    for _ in range(12):
        scheduler.input_batch.append_tokens(rows, np.array([9]), 0.0)
    assert scheduler.preempt() is request
    assert served(scheduler) == [request]
    expected = kv_cache_manager.hash_blocks(np.array([*[7] * 100, *[9] * 12], np.int32), 16, [])
    assert scheduler.cache._block_hashes[row] == expected


class _Lookups(dict[bytes, int]):
    """Dict that counts lookups."""

    count = 0

    def __contains__(self, key: object) -> bool:
        self.count += 1
        return super().__contains__(key)

    def get(self, key: bytes, default: Any = None) -> Any:
        self.count += 1
        return super().get(key, default)


@pytest.mark.parametrize("windows", [(0,), (64,), (64, 128), (0, 64)])
def test_each_block_is_looked_up_once(windows: tuple[int, ...]) -> None:
    """Each group's blocks are scanned once, not once for each length of the prefix."""
    cache = scheduler_of(6000, windows=windows, max_model_len=20_000).cache
    keys, rng = [number.to_bytes(2, "big") for number in range(1000)], random.Random(0)
    for density in (0.0, 0.5, 0.9, 0.99, 1.0):
        lookups = [_Lookups() for _ in cache.groups]
        for group, found in zip(cache.groups, lookups, strict=True):
            group.pool._block_of_hash, group.pool._hash_of_block = found, {}
            for block_id, key in zip(group.pool.allocate(1000), keys, strict=True):
                if rng.random() < density:
                    group.pool.cache_full_blocks([block_id], [key])
            found.count = 0
        count = longest_cached_prefix(cache.groups, keys)
        assert sum(found.count for found in lookups) <= len(windows) * 1000

        def is_cached(count: int, lookups: list[_Lookups] = lookups) -> bool:
            begins = [group.first_visible(16 * count) for group in cache.groups]
            return all(
                keys[block] in found
                for found, begin in zip(lookups, begins, strict=True)
                for block in range(begin, count)
            )

        assert count == next(count for count in range(1000, -1, -1) if is_cached(count))


def test_ten_thousand_waiting_requests_cost_no_more_than_a_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cost is the number of queued requests that a step, an abort or an expiry reads."""
    looked_at = count_calls(monkeypatch, Request, "__hash__")
    costs = {}
    for length in (100, 10_000):
        scheduler = scheduler_of(30, max_num_seqs=8)
        running = request_of(100, priority=-1)
        scheduler.add_request(running)
        scheduler.schedule()
        requests = [request_of(400, priority=number % 5) for number in range(length)]
        for request in requests:
            scheduler.add_request(request)
        looked_at.clear()
        iterated = count_iterated(monkeypatch)
        scheduler.schedule()
        scheduler.remove(requests[length // 2])
        assert scheduler.num_waiting == length - 1
        assert scheduler.overdue(requests[0].timings.arrived) == []
        assert scheduler.overdue(requests[3].timings.arrived) == requests[:3]
        costs[length] = len(looked_at), iterated[0]
    assert costs[100] == costs[10_000]


def count_iterated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list whose item counts the requests that iterations of queues return."""
    original, counted = RequestQueue.__iter__, [0]

    def iterate(queue: RequestQueue) -> Iterator[Request]:
        for request in original(queue):
            counted[0] += 1
            yield request

    monkeypatch.setattr(RequestQueue, "__iter__", iterate)
    return counted


def test_the_queue_keeps_its_order() -> None:
    rng, queue = random.Random(0), RequestQueue()
    places: dict[Request, tuple[int, int]] = {}
    out: list[Request] = []
    for number in range(3000):
        action = rng.random()
        if action < 0.5:
            request = request_of(1, priority=rng.randint(-3, 3))
            places[request] = request.priority, number
            queue.add(request)
        elif action < 0.7 and len(queue):
            first = queue.first
            assert first is not None
            assert queue.remove(first)
            first.timings.scheduled = 1.0
            out.append(first)
        elif action < 0.8 and out:
            out.sort(key=places.__getitem__)
            queue.put_back(out.pop())  # as `preempt` does: the last first
        elif len(queue):
            request = rng.choice(list(queue))
            assert queue.remove(request)
            assert not queue.remove(request)
            del places[request]
        waiting = sorted(places.keys() - set(out), key=places.__getitem__)
        assert list(queue) == waiting
        assert len(queue) == len(waiting)
        assert queue.first == next(iter(waiting), None)
        new = sorted(
            (r for r in waiting if r.timings.scheduled is None), key=lambda r: places[r][1]
        )
        assert list(queue.new) == new
