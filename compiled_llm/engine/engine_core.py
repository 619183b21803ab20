"""The engine loop: schedule a step, launch it, then process the output of the previous one.

The device thus always has the next step while the host works. A request that has ended is noticed
one step late; the token that it sampled in the meantime is dropped.
"""

import time
from collections import deque
from collections.abc import Callable

from compiled_llm.engine.input_batch import InputBatch
from compiled_llm.engine.kv_cache_manager import KVCacheManager
from compiled_llm.engine.model_runner_protocol import ModelRunnerProtocol
from compiled_llm.engine.output_processor import LaunchedStep, OutputProcessor
from compiled_llm.engine.request import Request
from compiled_llm.engine.scheduler import OutOfBlocksError, Scheduler
from compiled_llm.engine.scheduler_limits import SchedulerLimits
from compiled_llm.engine.scheduler_output import SchedulerOutput
from compiled_llm.runtime.step.batch_inputs import DecodeBatch

_MAX_IN_FLIGHT = 1  # launched steps whose output is not processed when a call of `step` returns


class EngineCore:
    """Steps over one scheduler. Recovery from an interrupted step replaces this object.

    Args:
        model_runner: runs the steps.
        vocab_size: number of token ids that the model generates.
        decode_token: returns the text of one token, for logprobs.
    """

    def __init__(
        self,
        model_runner: ModelRunnerProtocol,
        vocab_size: int,
        decode_token: Callable[[int], str] | None,
    ) -> None:
        limits, memory = model_runner.limits, model_runner.memory
        cache = KVCacheManager(
            memory.groups,
            block_size=memory.block_size,
            max_num_seqs=limits.max_num_seqs,
            max_blocks=memory.max_blocks,
            prefix_caching=model_runner.config.cache.prefix_caching and not model_runner.has_states,
        )
        self.batch = InputBatch(limits.max_num_seqs, limits.max_model_len, vocab_size)
        self.scheduler = Scheduler(self.batch, cache, SchedulerLimits.of(model_runner))
        self.outputs = OutputProcessor(
            self.scheduler, model_runner, vocab_size=vocab_size, decode_token=decode_token
        )
        self._model_runner = model_runner
        self._stats = model_runner.report.scheduling
        self._max_waiting_seconds = model_runner.config.limits.max_waiting_seconds
        self._in_flight: deque[LaunchedStep] = deque()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        unread = self._in_flight or self.outputs.updated_requests
        return bool(unread or self.scheduler.num_waiting or self.batch.running)

    def step(self) -> list[Request]:
        """Launch a step, process the output of the previous one, and return updated requests."""
        unread = bool(self._in_flight or self.outputs.updated_requests)
        prompts = bool(self.scheduler.num_waiting or self.batch.prefilling)
        if self._model_runner.maybe_capture(prompts_pending=prompts, steps_in_flight=unread):
            # A capture takes long, so the results of the steps so far are returned before it.
            self._process_outputs(0)
            return self.outputs.take_updated_requests()
        began, waited = time.perf_counter(), self._stats.wait_seconds
        self._abort_overdue(began)
        output = self.schedule()
        if output is not None:
            self.launch(output)
        self._process_outputs(_MAX_IN_FLIGHT if output is not None else 0)
        waited = self._stats.wait_seconds - waited
        self._stats.host_seconds += time.perf_counter() - began - waited
        return self.outputs.take_updated_requests()

    def schedule(self) -> SchedulerOutput | None:
        """Return the next step, or None; preempts requests if too few blocks are free."""
        while True:
            try:
                return self.scheduler.schedule()
            except OutOfBlocksError:
                if not self._in_flight:
                    self.scheduler.preempt()
                    self._stats.preemptions += 1
                self._process_outputs(0)

    def launch(self, output: SchedulerOutput) -> None:
        """Launch a step. Waits for it only if its logprobs or logits are processed on the host."""
        model_runner, batch = self._model_runner, output.batch
        for row, state in output.sampler_updates.items():
            model_runner.write_sampler_state(row, state)
        if isinstance(batch, DecodeBatch):
            handle = model_runner.decode(batch)
        else:
            handle = model_runner.prefill(batch)
        self._in_flight.append(LaunchedStep(output, handle))
        self._count(output)
        if output.scored:
            self.outputs.process_prompt_logprobs(output)
        # Tokens sampled on the host must be known before the next step can be scheduled.
        if self.batch.host_sampled[output.rows].any():
            self._process_outputs(0)

    def _process_outputs(self, num_left: int) -> None:
        while len(self._in_flight) > num_left:
            self.outputs.process_output(self._in_flight.popleft())

    def _count(self, output: SchedulerOutput) -> None:
        stats, batch = self._stats, output.batch
        stats.steps += 1
        stats.decode_steps += isinstance(batch, DecodeBatch)
        stats.tokens += len(batch.rows) if isinstance(batch, DecodeBatch) else len(batch.ids)
        for row in output.new_rows:
            request = self.batch.requests[row]
            if request is not None and not request.num_preemptions:
                stats.cached_tokens += request.num_cached_tokens

    def _abort_overdue(self, now: float) -> None:
        limit = self._max_waiting_seconds
        if limit is None:
            return
        error = f"it waited longer than limits.max_waiting_seconds={limit:g}"
        for request in self.scheduler.overdue(now - limit):
            self.outputs.end_request(request, "abort", error)
