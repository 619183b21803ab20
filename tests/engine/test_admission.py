"""Who gets a row when, and what that costs: in operations, which do not depend on the machine."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from compiled_llm.engine import kv_cache_manager
from compiled_llm.engine.input_batch import InputBatch
from compiled_llm.engine.kv_cache_manager import KVCacheManager
from compiled_llm.engine.request import Request
from compiled_llm.engine.request_queue import RequestQueue
from compiled_llm.engine.scheduler import Scheduler, SchedulerLimits
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
    """Blocks of 16 tokens, and 64 tokens a step."""
    groups = [
        KVCacheGroup(reach=AttentionReach.decode(window), layers=(n,), num_pages=1 + num_pages)
        for n, window in enumerate(windows)
    ]
    cache = KVCacheManager(
        groups,
        block_size=16,
        max_num_seqs=max_num_seqs,
        max_blocks=max_model_len // 16,
        sharing=True,
    )
    limits = SchedulerLimits(max_num_batched_tokens=64, prefill_sizes=[64], decodes_apart=True)
    return Scheduler(InputBatch(max_num_seqs, max_model_len), cache, limits)


def request_of(length: int, priority: int = 0, **options: Any) -> Request:
    params = options.pop("params", SamplingParams())
    return Request(
        prompt_token_ids=[priority + 7] * length,
        params=params,
        priority=priority,
        max_tokens=20,
        **options,
    )


def served(scheduler: Scheduler) -> list[Request]:
    """Whose tokens the next step computes, in order."""
    plan = scheduler.plan()
    assert plan is not None
    rows = plan.batch.seq_rows if isinstance(plan.batch, PrefillBatch) else plan.batch.rows
    return [scheduler.rows.request(row) for row in rows.tolist()]


def test_an_urgent_prompt_goes_before_a_long_one_that_has_begun() -> None:
    scheduler = scheduler_of(200)
    long, equal, urgent = request_of(300), request_of(40), request_of(20, priority=-1)
    scheduler.add(long)
    assert served(scheduler) == [long]
    scheduler.add(equal)
    scheduler.add(urgent)
    assert served(scheduler) == [urgent, long]
    assert served(scheduler)[-1] == long  # `equal` came later
    longer = request_of(100, priority=-2)
    scheduler.add(longer)
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
    scheduler.add(long)
    assert served(scheduler) == [long]
    scheduler.add(urgent)
    assert [served(scheduler) for _ in range(4)] == [[long]] * 4
    scheduler.release(scheduler.rows.requests.index(long))
    assert served(scheduler) == [urgent]


def test_the_urgent_prompt_of_a_model_with_states_goes_first() -> None:
    scheduler = scheduler_of(200)
    scheduler._limits.prefills_alone = True
    long, urgent = request_of(300), request_of(20, priority=-1)
    scheduler.add(long)
    assert served(scheduler) == [long]
    scheduler.add(urgent)
    assert [served(scheduler) for _ in range(3)] == [
        [urgent],
        [urgent],
        [long],
    ]  # one decodes in between


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    """The arguments' lengths of each call from now on."""
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
        count_calls(monkeypatch, kv_cache_manager, "chain"),
        count_calls(monkeypatch, KVCacheManager, "_num_shared"),
    )
    scheduler = scheduler_of(70)
    running = [request_of(150), request_of(150, priority=1)]
    for request in running:
        scheduler.add(request)
    for _ in range(6):
        scheduler.plan()
    del hashed[:], tried[:]
    waiting = request_of(1000, priority=2)
    scheduler.add(waiting)
    for _ in range(10):
        assert set(served(scheduler)) == set(running)
    assert (len(hashed), tried) == (1, [62])
    scheduler.release(scheduler.rows.requests.index(running[0]))
    for _ in range(5):
        assert served(scheduler) == [running[1]]
    assert (len(hashed), tried) == (1, [62])  # 10 pages more do not suffice
    scheduler.release(scheduler.rows.requests.index(running[1]))
    assert served(scheduler) == [waiting]
    assert (len(hashed), tried) == (2, [62, 62])  # the chunk's own blocks are looked up in its keys


def test_a_preempted_request_is_hashed_with_what_it_has_generated() -> None:
    scheduler = scheduler_of(70)
    request = request_of(100)
    scheduler.add(request)
    for _ in range(3):
        scheduler.plan()
    row = scheduler.rows.requests.index(request)
    rows = np.array([row])
    for _ in range(12):
        scheduler.rows.learn(rows, np.array([9]), 0.0)
    assert scheduler.preempt() is request
    assert served(scheduler) == [request]
    expected = kv_cache_manager.chain(np.array([*[7] * 100, *[9] * 12], np.int32), 16, [])
    assert scheduler.cache._keys[row] == expected


class CountingDict(dict[bytes, int]):
    """Counts how often a key is looked up."""

    lookups = 0

    def __contains__(self, key: object) -> bool:
        self.lookups += 1
        return super().__contains__(key)

    def get(self, key: bytes, default: Any = None) -> Any:
        self.lookups += 1
        return super().get(key, default)


@pytest.mark.parametrize("windows", [(0,), (64,), (64, 128), (0, 64)])
def test_each_block_is_looked_up_once(windows: tuple[int, ...]) -> None:
    """Whatever is missing: a scan of each group's blocks, not one for each length of the prefix."""
    cache = scheduler_of(6000, windows=windows, max_model_len=20_000).cache
    keys, rng = [number.to_bytes(2, "big") for number in range(1000)], random.Random(0)
    for density in (0.0, 0.5, 0.9, 0.99, 1.0):
        for pool in cache.pools:
            pool._pages, pool._keys = CountingDict(), {}
            for page, key in zip(pool.allocate(1000), keys, strict=True):
                if rng.random() < density:
                    pool.register(page, key)
            pool._pages.lookups = 0  # type: ignore[attr-defined]
        count = cache._num_shared(keys)
        assert sum(pool._pages.lookups for pool in cache.pools) <= len(windows) * 1000  # type: ignore[attr-defined]

        def shared(count: int) -> bool:
            begins = [cache._first_needed(reach, 16 * count) for reach in cache._reaches]
            return all(
                keys[b] in pool._pages
                for pool, begin in zip(cache.pools, begins, strict=True)
                for b in range(begin, count)
            )

        assert count == next(count for count in range(1000, -1, -1) if shared(count))


def test_ten_thousand_waiting_requests_cost_no_more_than_a_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted in requests of the queue that a step, an abort or an expiry looks at."""
    looked_at = count_calls(monkeypatch, Request, "__hash__")
    costs = {}
    for length in (100, 10_000):
        scheduler = scheduler_of(30, max_num_seqs=8)
        running = request_of(100, priority=-1)
        scheduler.add(running)
        scheduler.plan()
        requests = [request_of(400, priority=number % 5) for number in range(length)]
        for request in requests:
            scheduler.add(request)
        looked_at.clear()
        iterated = count_iterated(monkeypatch)
        scheduler.plan()
        scheduler.remove(requests[length // 2])
        assert scheduler.num_waiting == length - 1
        assert scheduler.overdue(requests[0].timings.arrived) == []
        assert scheduler.overdue(requests[3].timings.arrived) == requests[:3]
        costs[length] = len(looked_at), iterated[0]
    assert costs[100] == costs[10_000]


def count_iterated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests of queues were looked at in order."""
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
