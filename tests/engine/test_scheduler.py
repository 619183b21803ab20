"""Continuous batching on a simulated runtime: whatever comes, goes, shares and makes room, each request gets its own tokens."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compiled_llm.engine.engine import Engine
from compiled_llm.engine.input_batch import InputBatch
from compiled_llm.engine.kv_cache_manager import KVCacheManager
from compiled_llm.engine.request import Request
from compiled_llm.engine.scheduler import Scheduler, SchedulerLimits
from compiled_llm.runtime.limits import Limits
from compiled_llm.runtime.memory.kv_cache import KVCacheGroup, max_pages_per_seq
from compiled_llm.runtime.step.batch_inputs import PrefillBatch
from compiled_llm.sampling_params import SamplingParams
from passes.attention_reach import FULL, AttentionReach
from tests.helpers.simulated import VOCAB_SIZE, Sequences, SimulatedRuntime

STOPS = {"none": (), "two": (3, 5), "many": tuple(range(18))}
SAMPLINGS = {
    "greedy": {"temperature": 0},
    "random": {},
    "external": {"logits_processors": (lambda ids, logits: logits,)},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A runtime: its groups' windows and the pages that each has beyond one sequence's, and its limits."""

    windows: tuple[int, ...] = (0,)
    spare_pages: tuple[int, int] = (0, 0)
    block_size: int = 4
    max_num_seqs: int = 4
    spare_tokens: int = 12
    max_model_len: int = 100
    smaller_buckets: tuple[int, ...] | None = ()
    apart: bool = True
    sharing: bool = True
    states: bool = False

    def model_runner(self) -> SimulatedRuntime:
        limits = Limits(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_seqs + self.spare_tokens,
            max_model_len=self.max_model_len,
        )
        tokens = limits.max_num_batched_tokens
        buckets = (
            None
            if self.smaller_buckets is None
            else {size for size in self.smaller_buckets if size < tokens} | {tokens}
        )
        groups = [
            KVCacheGroup(
                reach=AttentionReach.decode(window),
                layers=(number,),
                num_pages=1
                + max_pages_per_seq(AttentionReach.decode(window), self.block_size, limits)
                + spare,
            )
            for number, (window, spare) in enumerate(
                zip(self.windows, self.spare_pages, strict=False)
            )
        ]
        sizes = sorted(buckets or ())
        return SimulatedRuntime(
            groups,
            limits,
            block_size=self.block_size,
            prefill_sizes=sizes,
            apart=self.apart,
            sharing=self.sharing,
            states=self.states,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A request: its prompt begins like others' do; when it arrives, and how many steps later it is withdrawn, if ever."""

    length: int = 20
    shared: int = 0
    beginning: int = 0
    seed: int = 0
    max_tokens: int = 10
    min_tokens: int = 0
    stops: str = "none"
    sampling: str = "greedy"
    scored: bool = False
    streaming: bool = False
    priority: int = 0
    arrival: int = 0
    abort_after: int | None = None

    @property
    def prompt(self) -> list[int]:
        same, own = random.Random(self.beginning), random.Random(10 + self.seed)
        shared = min(self.shared, self.length)
        return [
            rng.randrange(VOCAB_SIZE) for rng in [same] * shared + [own] * (self.length - shared)
        ]

    def request(self, max_model_len: int) -> Request:
        params = SamplingParams(
            **SAMPLINGS[self.sampling], prompt_logprobs=0 if self.scored else None, max_tokens=self.max_tokens,
            min_tokens=min(self.min_tokens, self.max_tokens),
        )  # fmt: skip
        return Request(
            prompt_token_ids=self.prompt, params=params, seed=self.seed, stop_token_ids=frozenset(STOPS[self.stops]),
            max_tokens=min(self.max_tokens, max_model_len - self.length), priority=self.priority, streaming=self.streaming,
        )  # fmt: skip

    def alone(self, sequences: Sequences, max_tokens: int) -> tuple[list[int], str]:
        """What it gives when nothing else runs."""
        sequence, stops, tokens = sequences.extend(0, self.prompt), STOPS[self.stops], list[int]()
        while len(tokens) < max_tokens:
            banned = stops if len(tokens) < min(self.min_tokens, self.max_tokens) else ()
            tokens.append(sequences.draw(sequence, self.seed, banned))
            if tokens[-1] in stops:
                return tokens, "stop"
            sequence = sequences.extend(sequence, tokens[-1:])
        return tokens, "length"


class Driver:
    """Lets requests arrive and leave, and checks after each step what must always hold."""

    def __init__(self, setup: Setup, cases: Sequence[Case], forget_at: int | None = None) -> None:
        self.model_runner, self._cases, self._forget_at = setup.model_runner(), cases, forget_at
        self.engine = Engine(self.model_runner, vocab_size=VOCAB_SIZE)  # type: ignore[arg-type]
        self.requests: dict[int, Request] = {}
        self.step = 0

    def run(self) -> None:
        free = self.engine.cache.num_free
        while len(self.requests) < len(self._cases) or self.engine.has_work:
            for number, case in enumerate(self._cases):
                if number not in self.requests and case.arrival <= self.step:
                    self.requests[number] = case.request(self.model_runner.limits.max_model_len)
                    self.engine.check(self.requests[number])
                    self.engine.add(self.requests[number])
                if case.abort_after is not None and case.arrival + case.abort_after == self.step:
                    self.engine.abort(self.requests[number])
                    self._check_places()
            if self.step == self._forget_at:
                self.engine.reset_prefix_cache()
            self._step()
            self.step += 1
            assert self.step < 10_000, "no end in sight"
        assert (
            self.engine.cache.num_free
            == free
            == [pool.capacity for pool in self.engine.cache.pools]
        )
        stats, requests = self.model_runner.report.scheduling, self.requests.values()
        assert stats.tokens == self.model_runner.num_tokens
        assert stats.preemptions == sum(request.num_preemptions for request in requests)
        assert stats.cached_tokens <= sum(request.num_cached_tokens for request in requests)
        for number, case in enumerate(self._cases):
            self._check_result(case, self.requests[number])

    def _step(self) -> None:
        scheduled = {
            request for request in self.requests.values() if request.timings.scheduled is not None
        }
        had_work, before = (
            self.engine.has_work,
            (self.model_runner.num_tokens, self.model_runner.num_reads),
        )
        news = self.engine.step()
        assert (
            news
            or not had_work
            or before != (self.model_runner.num_tokens, self.model_runner.num_reads)
        ), "a step did nothing"
        assert all(request.finish_reason is not None or request.token_ids for request in news)
        self._check_places()
        self._check_order(scheduled)

    def _check_order(self, scheduled: set[Request]) -> None:
        """The queue keeps its order, and who came last makes room first."""
        order = {
            request: (request.priority, number)
            for number, request in enumerate(self.requests.values())
        }
        waiting, running = (
            self.engine._scheduler.waiting,
            [r for r in self.engine._rows.requests if r is not None],
        )
        first_waiting = min((order[request] for request in waiting), default=(99, 0))
        first_preempted = min(
            (order[request] for request in waiting if request.num_preemptions), default=(99, 0)
        )
        assert all(
            order[request] < first_waiting for request in running if request not in scheduled
        )
        assert all(order[request] < first_preempted for request in running)

    def _check_places(self) -> None:
        """Each request that has not ended is in one place, and nobody else holds pages."""
        self.engine.cache.check()
        places = [
            *self.engine._scheduler.waiting,
            *(r for r in self.engine._rows.requests if r is not None),
        ]
        unfinished = [
            request for request in self.requests.values() if request.finish_reason is None
        ]
        assert len(places) == len(unfinished)
        assert set(places) == set(unfinished)

    def _check_result(self, case: Case, request: Request) -> None:
        assert request.num_cached_tokens < case.length
        expected, reason = case.alone(self.model_runner.sequences, request.max_tokens)
        if request.finish_reason == "abort":
            assert case.abort_after is not None
            assert request.token_ids == expected[: len(request.token_ids)]
            return
        assert (request.token_ids, request.finish_reason) == (expected, reason)
        if case.scored:
            path = self.model_runner.sequences.path(
                self.model_runner.sequences.extend(0, case.prompt)
            ).tolist()
            assert request.prompt_logprobs is not None
            assert request.prompt_logprobs[0] is None
            scores = [
                entry[token].logprob
                for entry, token in zip(request.prompt_logprobs[1:], case.prompt[1:], strict=True)
            ]
            assert scores == path[:-1]


setups = st.builds(
    Setup,
    windows=st.sampled_from([(0,), (0,), (6,), (21,), (48,), (0, 7), (30, 0), (9, 40)]),
    spare_pages=st.tuples(*[st.just(0) | st.integers(0, 12)] * 2),
    block_size=st.sampled_from([4, 4, 16, 1]),
    max_num_seqs=st.integers(1, 6),
    spare_tokens=st.sampled_from([0, 1, 4, 11, 30, 60]),
    max_model_len=st.sampled_from([61, 80, 100]),
    smaller_buckets=st.none() | st.lists(st.integers(1, 60), max_size=3).map(tuple),
    apart=st.booleans(),
    sharing=st.booleans(),
    states=st.sampled_from([False, False, True]),
)
cases = st.builds(
    Case,
    length=st.integers(1, 60),
    shared=st.just(60) | st.integers(0, 60),
    beginning=st.integers(0, 1),
    seed=st.integers(0, 3),
    max_tokens=st.integers(1, 40),
    min_tokens=st.sampled_from([0, 0, 3, 20]),
    stops=st.sampled_from(sorted(STOPS)),
    sampling=st.sampled_from(["greedy", "greedy", "random", "external"]),
    scored=st.sampled_from([False, False, False, True]),
    streaming=st.booleans(),
    priority=st.sampled_from([0, 0, 0, -1, 1]),
    arrival=st.integers(0, 25),
    abort_after=st.none() | st.none() | st.integers(0, 25),
)


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    setup=setups,
    cases=st.lists(cases, min_size=1, max_size=12),
    forget_at=st.none() | st.integers(0, 40),
)
def test_each_request_gets_what_it_gives_alone(
    setup: Setup, cases: list[Case], forget_at: int | None
) -> None:
    Driver(setup, cases, forget_at).run()


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("windows", [(0,), (21,), (0, 7)])
def test_many_requests_in_few_pages(windows: tuple[int, ...], apart: bool) -> None:
    rng = random.Random(0)
    cases = [
        Case(
            length=rng.randint(1, 60),
            shared=rng.choice([0, 30, 60]),
            seed=number,
            max_tokens=rng.randint(1, 40),
            stops=rng.choice(["none", "two"]),
            sampling=rng.choice(["greedy", "random"]),
            arrival=rng.randint(0, 100),
        )
        for number in range(80)
    ]
    driver = Driver(Setup(windows=windows, max_num_seqs=6, apart=apart), cases)
    driver.run()
    stats = driver.model_runner.report.scheduling
    assert stats.preemptions > 0
    assert stats.cached_tokens > 200
    assert stats.decode_steps > 50 or not apart


def test_prompts_of_a_model_with_states_take_turns_with_rows_that_decode() -> None:
    rows = InputBatch(max_num_seqs=4, max_model_len=128)
    cache = KVCacheManager(
        [KVCacheGroup(reach=FULL, layers=(0,), num_pages=100)],
        block_size=16,
        max_num_seqs=4,
        max_blocks=8,
        sharing=False,
    )
    limits = SchedulerLimits(
        max_num_batched_tokens=8, prefill_sizes=[8], decodes_apart=True, prefills_alone=True
    )
    scheduler = Scheduler(rows, cache, limits)
    for length in (20, 17):
        scheduler.add(
            Request(prompt_token_ids=[7] * length, params=SamplingParams(), max_tokens=20)
        )
    sizes = []
    for _ in range(9):
        plan = scheduler.plan()
        assert plan is not None
        sizes.append(
            ("prefill", len(plan.batch.ids))
            if isinstance(plan.batch, PrefillBatch)
            else ("decode", len(plan.rows))
        )
    first = [("prefill", 4), ("prefill", 8), ("prefill", 8)]
    assert sizes == [
        *first,
        ("decode", 1),
        ("prefill", 1),
        ("decode", 1),
        ("prefill", 8),
        ("decode", 1),
        ("prefill", 8),
    ]


@pytest.mark.parametrize("window", [12, 20, 28])
def test_shared_pages_of_a_window_leave_room_for_the_rest(window: int) -> None:
    """One sequence's pages suffice for one sequence, however many of its blocks are shared."""
    cases = [Case(length=window + 1, shared=60), Case(length=60, shared=60, arrival=30)]
    driver = Driver(Setup(windows=(window,), max_num_seqs=1, spare_tokens=3), cases)
    driver.run()
    assert driver.requests[1].num_cached_tokens >= window


@pytest.mark.parametrize(
    ("num_decoding", "lengths", "expected"),
    [
        (0, [16], 16),
        (0, [10], 10),  # no full bucket to prefer
        (0, [17], 16),  # 1 token waits, instead of 47 of padding
        (0, [10, 10], 16),
        (0, [39], 16),
        (0, [40], 40),  # to put 24 off would spare as many
        (0, [60], 60),
        (0, [100], 64),
        (2, [15], 16),
        (16, [30], 46),  # decoding rows alone fill the bucket
        (17, [1], 18),
        (15, [5], 20),  # instead of 1 token in each of 5 steps
        (8, [16], 16),  # 8 tokens, twice
    ],
)
def test_a_full_bucket_is_preferred_to_a_slight_spill(
    num_decoding: int, lengths: list[int], expected: int
) -> None:
    rows = InputBatch(max_num_seqs=32, max_model_len=128)
    group = KVCacheGroup(reach=FULL, layers=(0,), num_pages=1000)
    cache = KVCacheManager([group], block_size=16, max_num_seqs=32, max_blocks=8, sharing=False)
    limits = SchedulerLimits(max_num_batched_tokens=64, prefill_sizes=[16, 64], decodes_apart=True)
    scheduler = Scheduler(rows, cache, limits)
    for length in [1] * num_decoding:
        scheduler.add(
            Request(prompt_token_ids=[7] * length, params=SamplingParams(), max_tokens=20)
        )
    while num_decoding > rows.decoding.sum():
        assert scheduler.plan() is not None
    left = sum(lengths)
    for length in lengths:
        scheduler.add(
            Request(prompt_token_ids=[7] * length, params=SamplingParams(), max_tokens=20)
        )
    sizes = []
    while left:
        plan = scheduler.plan()
        assert plan is not None
        assert isinstance(plan.batch, PrefillBatch)
        sizes.append(len(plan.batch.ids))
        left -= int((plan.batch.ids >= 0).sum())
    assert sizes[0] == expected
