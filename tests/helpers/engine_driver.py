"""Driver of an engine on a simulated model runner, which checks invariants."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from compiled_llm.engine.engine import Engine
from compiled_llm.engine.request import Request
from compiled_llm.runtime.limits import Limits
from compiled_llm.runtime.memory.kv_cache import KVCacheGroup, max_pages_per_seq
from compiled_llm.sampling_params import SamplingParams
from passes.attention_reach import AttentionReach
from tests.helpers.simulated import VOCAB_SIZE, Sequences, SimulatedModelRunner

STOPS = {"none": (), "two": (3, 5), "many": tuple(range(18))}


SAMPLINGS = {
    "greedy": {"temperature": 0},
    "random": {},
    "host": {"logits_processors": (lambda ids, logits: logits,)},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Dimensions of a simulated model runner; spare pages are those beyond one sequence."""

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

    def model_runner(self) -> SimulatedModelRunner:
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
        return SimulatedModelRunner(
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
    """A request whose prompt shares a prefix with others; it may be aborted after some steps."""

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
            **SAMPLINGS[self.sampling],
            prompt_logprobs=0 if self.scored else None,
            max_tokens=self.max_tokens,
            min_tokens=min(self.min_tokens, self.max_tokens),
        )
        return Request(
            prompt_token_ids=self.prompt,
            sampling_params=params,
            seed=self.seed,
            stop_token_ids=frozenset(STOPS[self.stops]),
            max_tokens=min(self.max_tokens, max_model_len - self.length),
            priority=self.priority,
            streaming=self.streaming,
        )

    def alone(self, sequences: Sequences, max_tokens: int) -> tuple[list[int], str]:
        """Return what it generates alone."""
        sequence, stops, tokens = sequences.extend(0, self.prompt), STOPS[self.stops], list[int]()
        while len(tokens) < max_tokens:
            banned = stops if len(tokens) < min(self.min_tokens, self.max_tokens) else ()
            tokens.append(sequences.draw(sequence, self.seed, banned))
            if tokens[-1] in stops:
                return tokens, "stop"
            sequence = sequences.extend(sequence, tokens[-1:])
        return tokens, "length"


class Driver:
    """Adds and aborts requests, and checks invariants after each step."""

    def __init__(self, setup: Setup, cases: Sequence[Case], forget_at: int | None = None) -> None:
        self.model_runner, self._cases, self._forget_at = setup.model_runner(), cases, forget_at
        self.engine = Engine(self.model_runner, vocab_size=VOCAB_SIZE)  # type: ignore[arg-type]
        self.requests: dict[int, Request] = {}
        self.step = 0

    def run(self) -> None:
        free = self.engine.cache.num_free_blocks
        while len(self.requests) < len(self._cases) or self.engine.has_work:
            for number, case in enumerate(self._cases):
                if number not in self.requests and case.arrival <= self.step:
                    self.requests[number] = case.request(self.model_runner.limits.max_model_len)
                    self.engine.validate(self.requests[number])
                    self.engine.add_request(self.requests[number])
                if case.abort_after is not None and case.arrival + case.abort_after == self.step:
                    self.engine.abort(self.requests[number])
                    self._check_places()
            if self.step == self._forget_at:
                self.engine.reset_prefix_cache()
            self._step()
            self.step += 1
            assert self.step < 10_000, "no end in sight"
        assert (
            self.engine.cache.num_free_blocks
            == free
            == [group.pool.capacity for group in self.engine.cache.groups]
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
        updated = self.engine.step()
        assert (
            updated
            or not had_work
            or before != (self.model_runner.num_tokens, self.model_runner.num_reads)
        ), "a step did nothing"
        assert all(request.finish_reason is not None or request.token_ids for request in updated)
        self._check_places()
        self._check_order(scheduled)

    def _check_order(self, scheduled: set[Request]) -> None:
        """Assert that the queue is in order, and that the last arrival is preempted first."""
        order = {
            request: (request.priority, number)
            for number, request in enumerate(self.requests.values())
        }
        waiting, running = (
            self.engine._core.scheduler.waiting,
            [r for r in self.engine._core.batch.requests if r is not None],
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
        """Assert that each unfinished request is in one place, and no other blocks are used."""
        self.engine.cache.check()
        places = [
            *self.engine._core.scheduler.waiting,
            *(r for r in self.engine._core.batch.requests if r is not None),
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
