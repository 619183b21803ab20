"""Scheduling of prompts: admission of waiting requests, and the next chunk of each prompt."""

import time
from collections.abc import Mapping
from itertools import islice

import numpy as np

from compiled_llm.engine.input_batch import InputBatch
from compiled_llm.engine.kv_cache_manager import KVCacheManager
from compiled_llm.engine.prefix_cache import Candidate
from compiled_llm.engine.request import Request
from compiled_llm.engine.request_queue import RequestQueue
from compiled_llm.engine.scheduler_limits import SchedulerLimits
from compiled_llm.engine.scheduler_output import Chunk


class PromptScheduler:
    """Chooses the prompt tokens of each step.

    Args:
        input_batch: the rows.
        cache: their blocks.
        limits: limits of a step.
        queue: requests that wait for a row.
        arrivals: number of each unfinished request, by arrival.
    """

    def __init__(
        self,
        input_batch: InputBatch,
        cache: KVCacheManager,
        limits: SchedulerLimits,
        queue: RequestQueue,
        arrivals: Mapping[Request, int],
    ) -> None:
        self._batch = input_batch
        self._cache = cache
        self._limits = limits
        self._queue = queue
        self._arrivals = arrivals
        # The first request of the queue, once its admission was tried.
        self._candidate: tuple[Request, Candidate] | None = None
        self._new_rows: list[int] = []

    def take_new_rows(self) -> list[int]:
        """Return the rows of requests admitted since the last call."""
        rows, self._new_rows = self._new_rows, []
        return rows

    def row_order(self, row: int) -> tuple[int, int]:
        """Return the key by which rows are ordered: priority, then arrival."""
        return self._order(self._batch.request(row))

    def chunks(self, num_decoding: int) -> list[Chunk]:
        """Return chunks of prompts within the budget that the decoding rows leave."""
        chunks: list[Chunk] = []
        budget, more = self._budget(num_decoding), True
        in_progress = sorted(self._batch.prefilling, key=self.row_order)
        while more and budget:
            row = self._next_prompt(in_progress)
            chunk = self._next_chunk(row, budget) if row is not None else None
            more = chunk is not None
            if chunk is not None:
                chunks.append(chunk)
                budget -= chunk.count
        return chunks

    def single_chunk(self) -> list[Chunk]:
        """Return at most one chunk, for models whose prefill steps serve a single sequence.

        All chunks of a prompt but the first have `max_num_batched_tokens` tokens.
        """
        batch, most = self._batch, self._limits.max_num_batched_tokens
        row = self._next_prompt(sorted(batch.prefilling, key=self.row_order))
        if row is None:
            return []
        left = int(batch.num_prefill_tokens[row] - batch.num_computed_tokens[row])
        chunk = self._next_chunk(row, (left - 1) % most + 1)
        return [chunk] if chunk is not None else []

    def drop_candidate(self, request: Request) -> None:
        """Discard the block hashes of a request that leaves the queue."""
        if self._candidate is not None and self._candidate[0] is request:
            self._candidate = None

    def _order(self, request: Request) -> tuple[int, int]:
        return request.priority, self._arrivals[request]

    def _next_prompt(self, in_progress: list[int]) -> int | None:
        """Return the row of the most urgent prompt, removed from `in_progress` or the queue.

        If there is no row or block for the first request of the queue, it waits, and the prompts
        in progress, which are sorted by `row_order`, continue.
        """
        first = self._queue.first
        if first is not None and (
            not in_progress or self._order(first) < self.row_order(in_progress[0])
        ):
            row = self._admit(first)
            if row is not None:
                return row
        return in_progress.pop(0) if in_progress else None

    def _budget(self, num_decoding: int) -> int:
        batch, limit = self._batch, self._limits.max_num_batched_tokens
        uncomputed = (batch.num_prefill_tokens - batch.num_computed_tokens)[batch.prefilling]
        num_pending = num_decoding + int(uncomputed.sum())
        for request in islice(self._queue, len(batch.free)):
            if num_pending >= limit:
                break
            num_pending += len(request.prompt_token_ids) + len(request.token_ids)
        return self._limits.prefill_budget(num_pending, num_decoding)

    def _admit(self, request: Request) -> int | None:
        """Give the first request of the queue a row, if there are a row and enough blocks.

        One block for each running request stays free, for its next tokens.
        """
        batch = self._batch
        if not batch.free:
            return None
        row, margin = batch.free[-1], len(batch.running)
        num_cached = self._cache.admit(row, self._candidate_of(request), margin=margin)
        if num_cached is None:
            return None
        self._queue.remove(request)
        self.drop_candidate(request)
        batch.add_request(row, request, num_cached)
        self._new_rows.append(row)
        if request.timings.scheduled is None:
            request.timings.scheduled = time.perf_counter()
            request.num_cached_tokens = num_cached
        return row

    def _candidate_of(self, request: Request) -> Candidate:
        if self._candidate is None or self._candidate[0] is not request:
            tokens = np.array([*request.prompt_token_ids, *request.token_ids], np.int32)
            may_share = request.sampling_params.prompt_logprobs is None
            self._candidate = request, self._cache.candidate(tokens, may_share=may_share)
        return self._candidate[1]

    def _next_chunk(self, row: int, budget: int) -> Chunk | None:
        """Return the next tokens of a row's prompt, or None if too few blocks are free."""
        batch = self._batch
        start, num_prefill = int(batch.num_computed_tokens[row]), int(batch.num_prefill_tokens[row])
        end = min(num_prefill, start + budget)
        if not self._cache.allocate_slots(row, start, end):
            return None
        batch.num_computed_tokens[row] = end
        self._cache.cache_full_blocks(row, batch.tokens[row, :end])
        if end == num_prefill:
            batch.prefilling.remove(row)
        return Chunk(row, start, end - start)
