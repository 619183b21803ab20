"""The loop: plan a step, launch it, and only then learn what the step before it sampled.

The device so always has the next step to go on with while the host is busy; a request that ended is noticed one step late,
and the token it drew in the meantime is dropped.

A call that changes the engine marks it inconsistent until it returns. If an exception cuts the call short, the mark stays, and
the next call first recovers (see `recovery`). So an exception may be raised anywhere, and by anything.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compiled_llm.engine.input_batch import InputBatch
from compiled_llm.engine.kv_cache_manager import KVCacheManager
from compiled_llm.engine.logits_processors import processed
from compiled_llm.engine.recovery import count_on_stack, move_unfinished
from compiled_llm.engine.request import Request
from compiled_llm.engine.request_checks import check
from compiled_llm.engine.sampling_rows import bias_of, extras_of
from compiled_llm.engine.scheduler import OutOfBlocksError, Scheduler, SchedulerLimits
from compiled_llm.engine.scheduler_output import SchedulerOutput
from compiled_llm.errors import EngineBrokenError, QueueFullError
from compiled_llm.outputs import FinishReason, by_token
from compiled_llm.runtime.model_runner import ModelRunner
from compiled_llm.runtime.step.batch_inputs import DecodeBatch, PrefillBatch
from compiled_llm.runtime.step.readback import Logprobs, StepHandle
from compiled_llm.runtime.step.sampler_state import SamplerState

_AHEAD = 1  # steps launched before the one whose tokens are learned
_MAX_FUTILE = 3
_NOT_FINITE = (
    "the scores of its next token are not finite: the model or a logits processor gave NaN or infinity, or nothing is left of the "
    "vocabulary after allowed_token_ids, bad_words, min_tokens and logits_processors"
)


@dataclass(frozen=True, slots=True)
class _Launched:
    plan: SchedulerOutput
    ticket: StepHandle


class Engine:
    """Runs requests on a runtime, with continuous batching.

    Args:
        runtime: a started runtime.
        vocab_size: rows of the output head; generated and banned token ids are below it.
        num_embeddings: rows of the input embedding, if not `vocab_size`; token ids of prompts are below it.
        decode_token: text of one token, for logprobs.
    """

    def __init__(
        self,
        model_runner: ModelRunner,
        *,
        vocab_size: int,
        num_embeddings: int | None = None,
        decode_token: Callable[[int], str] | None = None,
    ) -> None:
        self._model_runner, self._vocab_size, self._decode_token = (
            model_runner,
            vocab_size,
            decode_token,
        )
        self._num_embeddings = vocab_size if num_embeddings is None else num_embeddings
        self._limits, self._stats = model_runner.config.limits, model_runner.report.scheduling
        self._scheduler = self._make_scheduler()
        self._launched: deque[_Launched] = deque()
        self._news: list[Request] = []
        self._withdrawn: deque[Request] = deque()  # to be aborted by the next step
        self._consistent = True
        self._cause = ""  # of the last call that was cut short
        self._futile = 0  # recoveries from errors, one after another, that ended no request
        self._broken: str | None = None

    @property
    def cache(self) -> KVCacheManager:
        """The pages of the running requests."""
        return self._scheduler.cache

    @property
    def _rows(self) -> InputBatch:
        return self._scheduler.rows

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return self._scheduler.num_waiting

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        pending = (
            self._news
            or self._launched
            or self._withdrawn
            or self.num_waiting
            or self._rows.running
        )
        return bool(pending) or not self._consistent

    @property
    def has_room(self) -> bool:
        """Whether one more request may wait."""
        return self._has_room_for(1)

    def check_room(self, count: int = 1) -> None:
        """Refuse `count` more requests unless all of them may wait; from any thread, where it is an estimate.

        Raises:
            ValueError: they are more than ever may.
            QueueFullError: too many others wait.
        """
        limit, num_rows = self._limits.max_waiting, len(self._rows.requests)
        if limit is not None and count > limit + num_rows:
            raise ValueError(
                f"n must be at most {limit + num_rows} here, got {count}: limits.max_num_seqs={num_rows} may run "
                f"and limits.max_waiting={limit} may wait"
            )
        if not self._has_room_for(count):
            reason = (
                "as many as limits.max_waiting allows"
                if count == 1
                else f"{count} more exceed limits.max_waiting={limit}"
            )
            raise QueueFullError(
                f"{self.num_waiting} requests are waiting, {reason}: retry later or raise it"
            )

    @property
    def broken(self) -> str | None:
        """Why the engine serves nothing more; None while it does."""
        return self._broken

    def check(self, request: Request) -> None:
        """Refuse what cannot be served, before anything reaches the device; raises ValueError."""
        check(
            request,
            vocab_size=self._vocab_size,
            num_embeddings=self._num_embeddings,
            max_model_len=self._model_runner.limits.max_model_len,
        )
        self._model_runner.check_samplers(
            request.params.sampler, scoring=request.params.prompt_logprobs is not None
        )

    def add(self, request: Request) -> None:
        """Let a checked request wait for its turn.

        Raises:
            QueueFullError: no more requests may wait.
            EngineBrokenError: the engine serves nothing more.
            RuntimeError: the model was changed, or this is called in another thread or within a step.
        """
        self._enter()
        self.check_room()
        if (
            not self.has_work
        ):  # once a batch of requests is enough: this takes longer than a step's own checks
            self._model_runner.check_model()
        with self._changing():
            self._scheduler.add(request)

    def abort(self, request: Request) -> None:
        """End a request wherever it is. One that has ended stays as it is.

        Its row and pages are free when this returns; if it is called from another thread, or (by a finalizer or a logits
        processor) while the engine is in a step, they are free before the next step.
        """
        if request.finish_reason is not None:
            return
        if self._broken is not None:
            request.finish_reason, request.error = "error", self._broken
        elif self._is_nested() or not self._model_runner.is_owner:
            self._withdrawn.append(request)
        else:
            with self._changing():
                if request.finish_reason is None:  # recovery may have ended it
                    self._end(request, "abort")

    def reset_prefix_cache(self) -> None:
        """Drop all cached prefix blocks."""
        with self._changing():
            self.cache.forget()

    def step(self) -> list[Request]:
        """Launch the next step, and learn what the one before it gave.

        Returns:
            The requests that ended, and those among the watched ones that got tokens.

        Raises:
            EngineBrokenError: an earlier call failed in a way that cannot be recovered from.
            Exception: whatever the step raised. The next call recovers: requests that were running end with an error.
        """
        with self._changing():
            news = self._step()
            self._futile = 0
            return news

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Mark the engine inconsistent until the block has run to its end."""
        self._enter()
        self._consistent = False
        try:
            yield
        except BaseException as error:
            self._cause = f"{type(error).__name__}: {error}".removesuffix(": ")
            self._futile += isinstance(error, Exception)
            raise
        self._consistent = True

    def _enter(self) -> None:
        """Refuse a call that may not be made now, and recover from one that was cut short."""
        if self._broken is not None:
            raise EngineBrokenError(f"this engine is broken: {self._broken}: make a new one")
        self._model_runner.check_owner()
        if self._consistent:
            return
        if self._is_nested():
            raise RuntimeError(
                "this engine is in a step, from which it cannot be called: return from the logits processor first"
            )
        self._recover()

    def _is_nested(self) -> bool:
        """Whether the current call was made from within another one, as by a logits processor or a finalizer."""
        return not self._consistent and count_on_stack(self, CHANGING, sys._getframe()) > 1

    def _recover(self) -> None:
        """Drop whatever the call that was cut short may have changed; see `recovery`."""
        try:
            self._model_runner.recover()
            fresh = self._make_scheduler()
            ended = move_unfinished(
                self._scheduler,
                fresh,
                f"the step that it ran in was cut short: {self._cause or 'interrupted'}",
            )
        except Exception as error:
            raise self._break(
                f"after {self._cause or 'an interrupt'} it could not recover, {type(error).__name__}: {error}"
            ) from error
        if ended:
            self._futile = 0
        if self._futile > _MAX_FUTILE:
            raise self._break(f"its steps fail although nothing runs, {self._cause}")
        self._news = list(dict.fromkeys([*self._news, *ended]))
        self._launched.clear()
        self._scheduler = fresh
        self._stats.recoveries += 1
        self._cause, self._consistent = "", True

    def _break(self, why: str) -> EngineBrokenError:
        """End all requests, serve nothing more, and return the error that says so."""
        self._broken = why
        for request in self._scheduler.unfinished:
            if request.finish_reason is None:
                request.finish_reason, request.error = "error", why
        return EngineBrokenError(f"this engine is broken: {why}: make a new one")

    def _make_scheduler(self) -> Scheduler:
        """A scheduler with rows and pages of its own, all of them free."""
        model_runner, limits = self._model_runner, self._model_runner.limits
        cache = KVCacheManager(
            model_runner.memory.groups,
            block_size=model_runner.memory.block_size,
            max_num_seqs=limits.max_num_seqs,
            max_blocks=model_runner.memory.state.max_blocks,
            sharing=model_runner.config.cache.prefix_caching and not model_runner.has_states,
        )
        return Scheduler(
            InputBatch(limits.max_num_seqs, limits.max_model_len),
            cache,
            SchedulerLimits.of(model_runner),
        )

    def _step(self) -> list[Request]:
        while self._withdrawn:
            request = self._withdrawn.popleft()
            if request.finish_reason is None:
                self._end(request, "abort")
        prompts = self.num_waiting or self._rows.prefilling
        outputs = self._launched or self._news
        if self._model_runner.maybe_capture(
            prompts_pending=bool(prompts), steps_in_flight=bool(outputs)
        ):
            self._learn_all()
            return self._take_news()
        began, waited = time.perf_counter(), self._stats.wait_seconds
        self._expire(began)
        plan = self._plan()
        if plan is not None:
            self._launch(plan)
        ahead = _AHEAD if plan is not None else 0
        while len(self._launched) > ahead:
            self._learn(self._launched.popleft())
        self._stats.host_seconds += (
            time.perf_counter() - began - (self._stats.wait_seconds - waited)
        )
        return self._take_news()

    def _has_room_for(self, count: int) -> bool:
        limit = self._limits.max_waiting
        return limit is None or self.num_waiting + count <= limit + len(self._rows.free)

    def _take_news(self) -> list[Request]:
        news, self._news = self._news, []
        return list(dict.fromkeys(news))

    def _plan(self) -> SchedulerOutput | None:
        while True:
            try:
                return self._scheduler.plan()
            except OutOfBlocksError:
                if not self._launched:
                    self._scheduler.preempt()
                    self._stats.preemptions += 1
                self._learn_all()

    def _launch(self, plan: SchedulerOutput) -> None:
        model_runner, rows, batch = self._model_runner, self._rows, plan.batch
        self._write_extras(plan)
        ticket = (
            model_runner.decode(batch)
            if isinstance(batch, DecodeBatch)
            else model_runner.prefill(batch)
        )
        self._launched.append(_Launched(plan, ticket))
        self._count(plan)
        if plan.scored:
            self._learn_prompts(plan)
        if rows.external[
            plan.rows
        ].any():  # their tokens are chosen on the host, before the next step can be planned
            self._learn_all()

    def _write_extras(self, plan: SchedulerOutput) -> None:
        for row in plan.joined:
            request = self._rows.requests[row]
            if request is not None and request.params.sampler == "full":
                self._model_runner.write_sampler_state(row, extras_of(request, self._vocab_size))
        for row in plan.lifted:
            request = self._rows.request(row)
            self._model_runner.write_sampler_state(
                row, SamplerState(bias=bias_of(request, self._vocab_size, may_stop=True))
            )

    def _count(self, plan: SchedulerOutput) -> None:
        stats, batch = self._stats, plan.batch
        stats.steps += 1
        stats.decode_steps += isinstance(batch, DecodeBatch)
        stats.tokens += len(batch.rows) if isinstance(batch, DecodeBatch) else len(batch.ids)
        joined = [self._rows.requests[row] for row in plan.joined]
        stats.cached_tokens += sum(
            request.num_cached_tokens
            for request in joined
            if request and not request.num_preemptions
        )

    def _learn_all(self) -> None:
        while self._launched:
            self._learn(self._launched.popleft())

    def _learn(self, launched: _Launched) -> None:
        """Take in what a step sampled, for the requests that still have their rows."""
        rows, plan = self._rows, launched.plan
        began = time.perf_counter()
        sampled = self._model_runner.tokens(launched.ticket)
        now = time.perf_counter()
        self._stats.wait_seconds += now - began
        live = plan.rows[rows.owner[plan.rows] == plan.owners]
        logprobs = (
            self._model_runner.logprobs(launched.ticket) if rows.logprobs[live].any() else None
        )
        for row in live[rows.external[live]].tolist():
            self._choose(row, sampled, logprobs)
        live = plan.rows[rows.owner[plan.rows] == plan.owners]
        for row in live[sampled[live] < 0].tolist():
            self.cache.withdraw(row)
            self._end(rows.request(row), "error", _NOT_FINITE)
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
        for row in live[(rows.known[live] - 1) % self.cache.block_size == 0].tolist():
            if rows.requests[row] is not None:
                self.cache.register(row, rows.tokens[row, : rows.known[row] - 1])

    def _watch(self, row: int, token: int, logprobs: Logprobs | None) -> None:
        """What one request wants to be done with its new token; should that fail, the request ends alone."""
        request = self._rows.request(row)
        request.token_ids.append(token)
        self._news.append(request)
        try:
            if request.logprobs is not None and logprobs is not None:
                count = request.params.logprobs
                request.logprobs.append(
                    by_token(
                        token, logprobs.values[row], logprobs.ids[row], count, self._decode_token
                    )
                )
            stops = request.detokenizer is not None and request.detokenizer.push(
                request.readable([token])
            )
        except Exception as error:
            self._end(request, "error", f"{type(error).__name__}: {error}")
            return
        if stops or token in request.stop_token_ids:
            self._end(request, "stop")

    def _choose(self, row: int, sampled: NDArray[np.int64], logprobs: Logprobs | None) -> None:
        """Let the request's own logits processors change its logits, and sample from those instead."""
        request, model_runner = self._rows.request(row), self._model_runner
        tokens, logits = self._rows.tokens[row, : self._rows.known[row]], model_runner.logits(row)
        self._stats.processor_calls += 1
        try:
            logits = processed(request, tokens, logits)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, too, is the request's own
            self._end(request, "error", f"{type(error).__name__}: {error}")
            return
        sampled[row], chosen = model_runner.sample_from_logits(row, logits)
        if logprobs is not None:
            logprobs.values[row], logprobs.ids[row] = chosen

    def _learn_prompts(self, plan: SchedulerOutput) -> None:
        """Take in the logprobs of prompt tokens; waits for the step just launched."""
        batch = plan.batch
        assert isinstance(batch, PrefillBatch)
        found = self._model_runner.prompt_logprobs(len(batch.ids))
        beyond = (
            batch.logprob_targets >= self._vocab_size
        )  # the output head has no logit for these: their probability is 0
        found.values[beyond, 0], found.ids[beyond, 0] = -np.inf, self._vocab_size + 1
        for chunk, begin in plan.scored:
            request = self._rows.request(chunk.row)
            assert request.prompt_logprobs is not None
            if chunk.start == 0:
                request.prompt_logprobs.append(None)
            count = request.params.prompt_logprobs
            try:
                for at in range(begin, begin + chunk.count):
                    if batch.num_logprobs[at] >= 0:
                        entry = by_token(
                            int(batch.logprob_targets[at]),
                            found.values[at],
                            found.ids[at],
                            count,
                            self._decode_token,
                        )
                        request.prompt_logprobs.append(entry)
            except Exception as error:  # the tokenizer's
                self._end(request, "error", f"{type(error).__name__}: {error}")

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a request wherever it is. The reason comes first, so that no interrupt loses a request that has left its row."""
        request.finish_reason, request.error = reason, error
        if request in self._rows.requests:
            self._scheduler.release(self._rows.requests.index(request))
        else:
            self._scheduler.remove(request)
        self._news.append(request)

    def _expire(self, now: float) -> None:
        limit = self._limits.max_waiting_seconds
        if limit is None:
            return
        for request in self._scheduler.overdue(now - limit):
            self._end(
                request, "abort", f"it waited longer than limits.max_waiting_seconds={limit:g}"
            )


# The code of the calls that change an engine, by which they are found on a thread's stack.
CHANGING = {
    method.__code__ for method in (Engine.add, Engine.abort, Engine.reset_prefix_cache, Engine.step)
}
