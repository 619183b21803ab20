"""The loop: plan a step, launch it, and only then learn what the step before it sampled.

The device so always has the next step to go on with while the host is busy; a request that ended is noticed one step late,
and the token it drew in the meantime is dropped.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compiled_llm.engine.checks import check
from compiled_llm.engine.kv_cache import KVCache
from compiled_llm.engine.outputs import FinishReason, by_token
from compiled_llm.engine.plan import Plan
from compiled_llm.engine.processors import processed
from compiled_llm.engine.request import Request
from compiled_llm.engine.row_params import bias_of, extras_of
from compiled_llm.engine.rows import Rows
from compiled_llm.engine.scheduler import OutOfPagesError, Scheduler, SchedulerLimits
from compiled_llm.runtime.batches import DecodeBatch, PrefillBatch
from compiled_llm.runtime.readback import Ticket
from compiled_llm.runtime.row_extras import RowExtras
from compiled_llm.runtime.runtime import Logprobs, Runtime

_AHEAD = 1  # steps launched before the one whose tokens are learned


class QueueFullError(RuntimeError):
    """`limits.max_waiting` requests are waiting already: come back later."""


@dataclass(frozen=True, slots=True)
class _Launched:
    plan: Plan
    ticket: Ticket


class Engine:
    """Runs requests on a runtime, with continuous batching.

    Args:
        runtime: a started runtime.
        vocab_size: token ids must be below it.
        decode_token: text of one token, for logprobs.
    """

    def __init__(self, runtime: Runtime, *, vocab_size: int, decode_token: Callable[[int], str] | None = None) -> None:
        memory, limits = runtime.memory, runtime.limits
        self._runtime, self._vocab_size, self._decode_token = runtime, vocab_size, decode_token
        self._limits, self._stats = runtime.config.limits, runtime.report.scheduling
        self._rows = Rows(limits.max_num_seqs, limits.max_model_len)
        self._cache = KVCache(
            memory.groups,
            block_size=memory.block_size,
            max_num_seqs=limits.max_num_seqs,
            max_blocks=memory.state.max_blocks,
            sharing=runtime.config.cache.prefix_caching and not runtime.has_states,
        )
        self._scheduler = Scheduler(self._rows, self._cache, SchedulerLimits.of(runtime))
        self._launched: deque[_Launched] = deque()
        self._news: list[Request] = []

    @property
    def cache(self) -> KVCache:
        """The pages of the running requests."""
        return self._cache

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return self._scheduler.num_waiting

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._news or self._launched or self.num_waiting or self._rows.running)

    @property
    def has_room(self) -> bool:
        """Whether one more request may wait."""
        limit = self._limits.max_waiting
        return limit is None or self.num_waiting < limit + len(self._rows.free)

    def check(self, request: Request) -> None:
        """Refuse what cannot be served, before anything reaches the device; raises ValueError."""
        check(request, vocab_size=self._vocab_size, max_model_len=self._runtime.limits.max_model_len)

    def add(self, request: Request) -> None:
        """Let a checked request wait for its turn; raises QueueFullError."""
        if not self.has_room:
            raise QueueFullError(
                f"{self.num_waiting} requests are waiting, as many as limits.max_waiting allows: retry later or raise it"
            )
        self._scheduler.add(request)

    def abort(self, request: Request) -> None:
        """End a request now, wherever it is; its row and pages are free. One that has ended stays as it is."""
        if request.finish_reason is None:
            self._end(request, "abort")

    def reset_prefix_cache(self) -> None:
        """Share nothing of what was computed so far with requests to come."""
        self._cache.forget()

    def step(self) -> list[Request]:
        """Launch the next step, and learn what the one before it gave.

        Returns:
            The requests that ended, and those among the watched ones that got tokens.
        """
        if self._captures_now():
            if self._launched or self._news:
                self._learn_all()
                return self._take_news()
            self._runtime.capture_next()
        began, waited = time.perf_counter(), self._stats.wait_seconds
        self._expire(began)
        plan = self._plan()
        if plan is not None:
            self._launch(plan)
        ahead = _AHEAD if plan is not None else 0
        while len(self._launched) > ahead:
            self._learn(self._launched.popleft())
        self._stats.host_seconds += time.perf_counter() - began - (self._stats.wait_seconds - waited)
        return self._take_news()

    def _captures_now(self) -> bool:
        """A capture may take long, so prompts are computed before it, unless they go on and on."""
        prompts = self.num_waiting or self._rows.prefilling
        return self._runtime.capture_overdue or (self._runtime.capture_due and not prompts)

    def _take_news(self) -> list[Request]:
        news, self._news = self._news, []
        return list(dict.fromkeys(news))

    def _plan(self) -> Plan | None:
        while True:
            try:
                return self._scheduler.plan()
            except OutOfPagesError:
                if not self._launched:
                    self._scheduler.preempt()
                    self._stats.preemptions += 1
                self._learn_all()

    def _launch(self, plan: Plan) -> None:
        runtime, rows, batch = self._runtime, self._rows, plan.batch
        self._write_extras(plan)
        ticket = runtime.decode(batch) if isinstance(batch, DecodeBatch) else runtime.prefill(batch)
        self._launched.append(_Launched(plan, ticket))
        self._count(plan)
        if plan.scored:
            self._learn_prompts(plan)
        if rows.external[plan.rows].any():  # their tokens are chosen on the host, before the next step can be planned
            self._learn_all()

    def _write_extras(self, plan: Plan) -> None:
        for row in plan.joined:
            request = self._rows.requests[row]
            if request is not None and request.params.sampler == "full":
                self._runtime.set_extras(row, extras_of(request, self._vocab_size))
        for row in plan.lifted:
            request = self._rows.request(row)
            self._runtime.set_extras(row, RowExtras(bias=bias_of(request, self._vocab_size, may_stop=True)))

    def _count(self, plan: Plan) -> None:
        stats, batch = self._stats, plan.batch
        stats.steps += 1
        stats.decode_steps += isinstance(batch, DecodeBatch)
        stats.tokens += len(batch.rows) if isinstance(batch, DecodeBatch) else len(batch.ids)
        joined = [self._rows.requests[row] for row in plan.joined]
        stats.cached_tokens += sum(request.num_cached_tokens for request in joined if request and not request.num_preemptions)

    def _learn_all(self) -> None:
        while self._launched:
            self._learn(self._launched.popleft())

    def _learn(self, launched: _Launched) -> None:
        """Take in what a step sampled, for the requests that still have their rows."""
        rows, plan = self._rows, launched.plan
        began = time.perf_counter()
        sampled = self._runtime.tokens(launched.ticket)
        now = time.perf_counter()
        self._stats.wait_seconds += now - began
        live = plan.rows[rows.owner[plan.rows] == plan.owners]
        logprobs = self._runtime.logprobs(launched.ticket) if rows.logprobs[live].any() else None
        for row in live[rows.external[live]].tolist():
            self._choose(row, sampled, logprobs)
        live = plan.rows[rows.owner[plan.rows] == plan.owners]
        tokens = sampled[live]
        stops = rows.learn(live, tokens, now)
        ends = stops | (rows.known[live] >= rows.limit[live])
        for number in np.flatnonzero(rows.watched[live]).tolist():
            self._watch(int(live[number]), int(tokens[number]), logprobs)
        for number in np.flatnonzero(ends).tolist():
            request = rows.requests[live[number]]
            if request is not None:  # a stop string or an error may have ended it
                self._end(request, "stop" if stops[number] else "length")
        for row in live[(rows.known[live] - 1) % self._cache.block_size == 0].tolist():
            if rows.requests[row] is not None:
                self._cache.register(row, rows.tokens[row, : rows.known[row] - 1])

    def _watch(self, row: int, token: int, logprobs: Logprobs | None) -> None:
        """What one request wants to be done with its new token; should that fail, the request ends alone."""
        request = self._rows.request(row)
        request.token_ids.append(token)
        self._news.append(request)
        try:
            if request.logprobs is not None and logprobs is not None:
                count = request.params.logprobs
                request.logprobs.append(by_token(token, logprobs.values[row], logprobs.ids[row], count, self._decode_token))
            stops = request.detokenizer is not None and request.detokenizer.push(request.readable([token]))
        except Exception as error:
            self._end(request, "error", f"{type(error).__name__}: {error}")
            return
        if stops or token in request.stop_token_ids:
            self._end(request, "stop")

    def _choose(self, row: int, sampled: NDArray[np.int64], logprobs: Logprobs | None) -> None:
        """Let the request's own logits processors change its logits, and sample from those instead."""
        request, runtime = self._rows.request(row), self._runtime
        tokens, logits = self._rows.tokens[row, : self._rows.known[row]], runtime.logits(row)
        self._stats.processor_calls += 1
        try:
            logits = processed(request, tokens, logits)
        except Exception as error:
            self._end(request, "error", f"{type(error).__name__}: {error}")
            return
        sampled[row], chosen = runtime.choose(row, logits)
        if logprobs is not None:
            logprobs.values[row], logprobs.ids[row] = chosen

    def _learn_prompts(self, plan: Plan) -> None:
        """Take in the logprobs of prompt tokens; waits for the step just launched."""
        batch = plan.batch
        assert isinstance(batch, PrefillBatch)
        found = self._runtime.prompt_logprobs(len(batch.ids))
        for chunk, begin in plan.scored:
            request = self._rows.request(chunk.row)
            assert request.prompt_logprobs is not None
            if chunk.start == 0:
                request.prompt_logprobs.append(None)
            for at in range(begin, begin + chunk.count):
                if batch.scores[at] >= 0:
                    token, count = int(batch.targets[at]), request.params.prompt_logprobs
                    request.prompt_logprobs.append(by_token(token, found.values[at], found.ids[at], count, self._decode_token))

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a request wherever it is."""
        if request in self._rows.requests:
            self._scheduler.release(self._rows.requests.index(request))
        else:
            self._scheduler.remove(request)
        request.finish_reason, request.error = reason, error
        self._news.append(request)

    def _expire(self, now: float) -> None:
        limit = self._limits.max_waiting_seconds
        if limit is None:
            return
        for request in self._scheduler.waiting:
            if request.timings.scheduled is None and now - request.timings.arrived > limit:
                self._end(request, "abort", f"it waited longer than limits.max_waiting_seconds={limit:g}")
