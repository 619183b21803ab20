"""Which rows and tokens make the next step.

Each step has a budget of tokens. Rows that decode come first, one token each; what is left goes to prompts, in chunks, by
priority and arrival: to those that have begun and, while rows and pages last, to those that wait. Where pages run out, the
request that came last (of the lowest priority) makes room and is computed again later, from its tokens.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

import numpy as np

from compiled_llm.engine.input_batch import InputBatch
from compiled_llm.engine.kv_cache_manager import Candidate, KVCacheManager
from compiled_llm.engine.request import Request
from compiled_llm.engine.request_queue import RequestQueue
from compiled_llm.engine.scheduler_output import Chunk, SchedulerOutput, plan_decode, plan_prefill
from compiled_llm.runtime.model_runner import ModelRunner
from compiled_llm.runtime.step.batch_inputs import Int64


class OutOfBlocksError(Exception):
    """There is no page for a row that decodes; what steps in flight will free is not known yet."""


@dataclass(slots=True, kw_only=True)
class SchedulerLimits:
    """The most tokens a step; the sizes of prefill buckets; whether steps that only decode are batches of their own, and whether
    those that prefill serve a single sequence."""

    max_num_batched_tokens: int
    prefill_sizes: Sequence[int]
    decodes_apart: bool
    prefills_alone: bool = False

    @classmethod
    def of(cls, model_runner: ModelRunner) -> "SchedulerLimits":
        tokens = model_runner.limits.max_num_batched_tokens
        return cls(
            max_num_batched_tokens=tokens,
            prefill_sizes=model_runner.prefill_sizes,
            decodes_apart=model_runner.separate_decode,
            prefills_alone=model_runner.has_states,
        )


class Scheduler:
    """Keeps the queue, and plans steps over the rows and their pages."""

    def __init__(self, rows: InputBatch, cache: KVCacheManager, limits: SchedulerLimits) -> None:
        self.rows, self.cache, self._limits = rows, cache, limits
        self._queue = RequestQueue()
        self._arrivals: dict[Request, int] = {}  # all unfinished requests, by arrival
        self._candidate: tuple[Request, Candidate] | None = (
            None  # the first of the queue, once it was tried
        )
        self._num_arrived = 0
        self._last_decode: Int64 | None = None
        self._joined: list[int] = []
        self._prefilled_alone = False

    @property
    def waiting(self) -> list[Request]:
        """Requests in the queue, in its order."""
        return list(self._queue)

    @property
    def unfinished(self) -> list[Request]:
        """All requests that were added and have not left, running or waiting, in the order of their arrival."""
        return list(self._arrivals)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    def add(self, request: Request) -> None:
        """Put a request into the queue."""
        self._arrivals[request] = self._num_arrived
        self._num_arrived += 1
        self._queue.add(request)

    def remove(self, request: Request) -> bool:
        """Take a request out of the queue; False when it is not there."""
        found = self._queue.remove(request)
        if found:
            self._forget_candidate(request)
            del self._arrivals[request]
        return found

    def overdue(self, moment: float) -> list[Request]:
        """The requests in the queue that never had a row and arrived before this moment."""
        return list(takewhile(lambda request: request.timings.arrived < moment, self._queue.new))

    def release(self, row: int) -> Request:
        """End what runs in the row: it and its pages are free from the next step on."""
        self.cache.release(row)
        request = self.rows.leave(row)
        del self._arrivals[request]
        return request

    def preempt(self) -> Request:
        """Put the request that came last, of the lowest priority, back into the queue, at the place it had."""
        row = max(self.rows.running, key=self._order)
        self.cache.release(row)
        request = self.rows.leave(row)
        request.num_preemptions += 1
        if request.prompt_logprobs is not None:
            request.prompt_logprobs = []  # outputs made before share the other list
        self._queue.put_back(request)
        return request

    def plan(self) -> SchedulerOutput | None:
        """The next step, or None when there is nothing to do until steps in flight have ended.

        Raises:
            OutOfPagesError: nothing has changed; learn what the steps in flight sampled, then preempt, then plan again.
        """
        rows = self.rows
        decoding = np.flatnonzero(rows.decoding)
        alone = self._alone(len(decoding)) if self._limits.prefills_alone else None
        if alone:
            decoding = decoding[:0]
        changed = self.cache.grow_decoding(decoding, rows.computed[decoding])
        if changed is None:
            raise OutOfBlocksError
        chunks = self._chunks(len(decoding)) if alone is None else alone
        if not chunks and not len(decoding):
            if rows.prefilling:
                raise OutOfBlocksError  # for the next chunk of a window's pages
            return None
        lifted = np.flatnonzero(rows.remaining == rows.lift_at).tolist()
        rows.lift_at[lifted] = -1
        apart = not chunks and self._limits.decodes_apart
        if apart:
            same = self._last_decode is not None and np.array_equal(decoding, self._last_decode)
            plan = plan_decode(rows, self.cache, decoding, changed, same_rows=same)
        else:
            plan = plan_prefill(rows, self.cache, decoding, chunks)
        plan.joined.extend(self._joined)
        plan.lifted.extend(lifted)
        self._joined.clear()
        rows.launch(decoding, 1)
        rows.sample(plan.rows)
        self._last_decode = decoding if apart else None
        self._prefilled_alone = bool(alone)
        return plan

    def _order(self, row: int) -> tuple[int, int]:
        return self._place(self.rows.request(row))

    def _place(self, request: Request) -> tuple[int, int]:
        """What requests are ordered by, whether they run or wait."""
        return request.priority, self._arrivals[request]

    def _chunks(self, num_decoding: int) -> list[Chunk]:
        """Chunks of prompts for what the decoding rows leave of the budget; requests from the queue take rows for them."""
        chunks: list[Chunk] = []
        budget, more = self._budget(num_decoding), True
        begun = sorted(self.rows.prefilling, key=self._order)
        while more and budget:
            row = self._next_prompt(begun)
            chunk = self._chunk(row, budget) if row is not None else None
            more = chunk is not None
            if chunk is not None:
                chunks.append(chunk)
                budget -= chunk.count
        return chunks

    def _alone(self, num_decoding: int) -> list[Chunk]:
        """A chunk of one prompt, in turns with rows that decode. All but a prompt's first are as large as a step can be."""
        if num_decoding and self._prefilled_alone:
            return []
        row = self._next_prompt(sorted(self.rows.prefilling, key=self._order))
        if row is None:
            return []
        most = self._limits.max_num_batched_tokens
        chunk = self._chunk(
            row, (int(self.rows.target[row] - self.rows.computed[row]) - 1) % most + 1
        )
        return [chunk] if chunk is not None else []

    def _next_prompt(self, begun: list[int]) -> int | None:
        """The row of the most urgent prompt, taken off `begun` (sorted by `_order`) or out of the queue.

        A request for which there is no row or no page waits, and the prompts that have begun go on.
        """
        first = self._queue.first
        if first is not None and (not begun or self._place(first) < self._order(begun[0])):
            row = self._admit()
            if row is not None:
                return row
        return begun.pop(0) if begun else None

    def _budget(self, num_decoding: int) -> int:
        """Tokens for prompts in this step: the budget, or fewer where more would spill just over the edge of a bucket.

        To spill is worth it when the bucket pads less than the edge would put off, or is no larger than all the steps up to the
        edge together, of which there are many where decoding rows leave little room.
        """
        rows, limit = self.rows, self._limits.max_num_batched_tokens
        work = num_decoding + int((rows.target - rows.computed)[rows.prefilling].sum())
        for request in islice(self._queue, len(rows.free)):
            if work >= limit:
                break
            work += len(request.prompt_token_ids) + len(request.token_ids)
        work = min(work, limit)
        edge = max((size for size in self._limits.prefill_sizes if size <= work), default=0)
        above = min((size for size in self._limits.prefill_sizes if size >= work), default=work)
        room = edge - num_decoding
        if (
            room <= 0
            or work - edge >= above - work
            or -(-(work - num_decoding) // room) * edge > above
        ):
            return limit - num_decoding
        return room

    def _admit(self) -> int | None:
        """Give the first request of the queue a row, if there are pages for its tokens and a few to go on with."""
        request = self._queue.first
        if request is None or not self.rows.free:
            return None
        row = self.rows.free[-1]
        if self._candidate is None or self._candidate[0] is not request:
            tokens = np.array([*request.prompt_token_ids, *request.token_ids], np.int32)
            self._candidate = (
                request,
                self.cache.candidate(tokens, may_hit=request.params.prompt_logprobs is None),
            )
        cached = self.cache.admit(row, self._candidate[1], margin=len(self.rows.running))
        if cached is None:
            return None
        self._queue.remove(request)
        self._forget_candidate(request)
        self.rows.take(row, request, cached)
        self._joined.append(row)
        if request.timings.scheduled is None:
            request.timings.scheduled, request.num_cached_tokens = time.perf_counter(), cached
        return row

    def _forget_candidate(self, request: Request) -> None:
        if self._candidate is not None and self._candidate[0] is request:
            self._candidate = None

    def _chunk(self, row: int, budget: int) -> Chunk | None:
        """The next tokens of a row's prompt, or None when there is no page for them."""
        rows = self.rows
        start = int(rows.computed[row])
        count = min(int(rows.target[row]) - start, budget)
        if not self.cache.grow(row, start, start + count):
            return None
        rows.computed[row] += count
        self.cache.register(row, rows.tokens[row, : start + count])
        if start + count == rows.target[row]:
            rows.prefilling.remove(row)
        return Chunk(row, start, count)
