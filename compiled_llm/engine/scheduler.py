"""Scheduler: selects the rows and tokens of the next step.

Each step has a budget of tokens. Decoding rows come first, one token each. The rest goes to chunks
of prompts, by priority and arrival: prompts in progress and, while rows and blocks are free,
waiting ones. If blocks run out, the request that arrived last, of the lowest priority, is
preempted: its blocks are freed, and it is computed again later from its tokens.
"""

import logging
from itertools import takewhile

import numpy as np

from compiled_llm.engine.input_batch import InputBatch
from compiled_llm.engine.kv_cache_manager import KVCacheManager
from compiled_llm.engine.prompt_scheduler import PromptScheduler
from compiled_llm.engine.request import Request
from compiled_llm.engine.request_queue import RequestQueue
from compiled_llm.engine.scheduler_limits import SchedulerLimits
from compiled_llm.engine.scheduler_output import (
    Chunk,
    SchedulerOutput,
    decode_output,
    prefill_output,
)
from compiled_llm.runtime.step.batch_inputs import Int64

logger = logging.getLogger(__name__)


class OutOfBlocksError(Exception):
    """A row needs a block and none is free; steps in flight may still end requests."""


class Scheduler:
    """Holds the waiting requests and schedules steps over rows and blocks."""

    def __init__(
        self, input_batch: InputBatch, cache: KVCacheManager, limits: SchedulerLimits
    ) -> None:
        self.input_batch = input_batch
        self.cache = cache
        self._limits = limits
        self._queue = RequestQueue()
        # All unfinished requests with their numbers, in the order of arrival.
        self._arrivals: dict[Request, int] = {}
        self._num_arrived = 0
        self._prompts = PromptScheduler(input_batch, cache, limits, self._queue, self._arrivals)
        self._last_decoding: Int64 | None = None
        self._last_was_prefill = False

    @property
    def waiting(self) -> list[Request]:
        """Requests of the queue, in its order."""
        return list(self._queue)

    @property
    def unfinished(self) -> list[Request]:
        """Running and waiting requests, in the order of arrival."""
        return list(self._arrivals)

    @property
    def num_waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._queue)

    def add_request(self, request: Request) -> None:
        """Add a request to the queue."""
        self._arrivals[request] = self._num_arrived
        self._num_arrived += 1
        self._queue.add(request)

    def remove(self, request: Request) -> bool:
        """Remove a request from the queue; return False if it is not there."""
        found = self._queue.remove(request)
        if found:
            self._prompts.drop_candidate(request)
            del self._arrivals[request]
        return found

    def overdue(self, moment: float) -> list[Request]:
        """Return the requests that were never scheduled and arrived before this moment.

        Args:
            moment: seconds of `time.perf_counter`.
        """
        return list(takewhile(lambda request: request.timings.arrived < moment, self._queue.new))

    def release(self, row: int) -> Request:
        """Remove the request of a row, and free the row and its blocks."""
        self.cache.free(row)
        request = self.input_batch.remove_request(row)
        del self._arrivals[request]
        return request

    def preempt(self) -> Request:
        """Put the request that arrived last, of the lowest priority, back into the queue."""
        row = max(self.input_batch.running, key=self._prompts.row_order)
        self.cache.free(row)
        request = self.input_batch.remove_request(row)
        request.num_preemptions += 1
        if request.prompt_logprobs is not None:
            request.prompt_logprobs = []  # outputs made before share the old list
        self._queue.put_back(request)
        logger.debug("Preempted a request: no block of the KV cache is free")
        return request

    def schedule(self) -> SchedulerOutput | None:
        """Return the next step, or None if nothing can run until steps in flight have ended.

        Raises:
            OutOfBlocksError: no row was advanced. Process the output of the steps in flight, or
                preempt a request if there are none, and call this again.
        """
        batch = self.input_batch
        decoding = np.flatnonzero(batch.decoding)
        single = self._single_chunk(len(decoding)) if self._limits.one_sequence_prefill else None
        if single:
            decoding = decoding[:0]
        positions = batch.num_computed_tokens[decoding]
        changed = self.cache.allocate_decode_slots(decoding, positions)
        if changed is None:
            raise OutOfBlocksError
        chunks = self._prompts.chunks(len(decoding)) if single is None else single
        if not chunks and not len(decoding):
            if batch.prefilling:
                raise OutOfBlocksError  # for the next chunk, in a group with a window
            return None
        batch.lift_stop_token_bans()
        output = self._make_output(decoding, chunks, changed)
        batch.num_computed_tokens[decoding] += 1
        batch.mark_sampled(output.rows)
        self._last_was_prefill = bool(single)
        return output

    def _single_chunk(self, num_decoding: int) -> list[Chunk]:
        """Return a chunk of one prompt, in every second step while rows decode."""
        return [] if num_decoding and self._last_was_prefill else self._prompts.single_chunk()

    def _make_output(
        self, decoding: Int64, chunks: list[Chunk], changed: tuple[Int64, Int64, Int64]
    ) -> SchedulerOutput:
        batch, last = self.input_batch, self._last_decoding
        if not chunks and self._limits.separate_decode:
            same_rows = last is not None and np.array_equal(decoding, last)
            output = decode_output(batch, self.cache, decoding, changed, same_rows=same_rows)
            self._last_decoding = decoding
        else:
            output = prefill_output(batch, self.cache, decoding, chunks)
            self._last_decoding = None
        output.new_rows.extend(self._prompts.take_new_rows())
        output.sampler_updates.update(batch.take_sampler_updates())
        return output
