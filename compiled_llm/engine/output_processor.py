"""Processing of a step's output: new tokens, logprobs, stop conditions and errors of requests."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compiled_llm.engine.logits_processors import apply_logits_processors
from compiled_llm.engine.model_runner_protocol import ModelRunnerProtocol
from compiled_llm.engine.request import Request
from compiled_llm.engine.scheduler import Scheduler
from compiled_llm.engine.scheduler_output import Chunk, SchedulerOutput
from compiled_llm.outputs import FinishReason, Logprob
from compiled_llm.runtime.step.batch_inputs import Int64, PrefillBatch
from compiled_llm.runtime.step.readback import Logprobs, StepHandle

_NOT_FINITE = (
    "the logits of its next token are not finite: the model or a logits processor returned NaN or "
    "infinity, or allowed_token_ids, bad_words, min_tokens and logits_processors ban every token"
)


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step in flight."""

    scheduler_output: SchedulerOutput
    handle: StepHandle


class OutputProcessor:
    """Applies the output of steps to the requests of one scheduler.

    Args:
        scheduler: the scheduler whose steps these are.
        model_runner: runs the steps.
        vocab_size: number of token ids that the model generates.
        decode_token: returns the text of one token, for logprobs.

    Attributes:
        updated_requests: requests that ended, and those with `needs_host_update` that got tokens,
            since the last call of `take_updated_requests`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        model_runner: ModelRunnerProtocol,
        *,
        vocab_size: int,
        decode_token: Callable[[int], str] | None,
    ) -> None:
        self.scheduler = scheduler
        self.updated_requests: list[Request] = []
        self._model_runner = model_runner
        self._vocab_size = vocab_size
        self._decode_token = decode_token
        self._batch = scheduler.input_batch
        self._stats = model_runner.report.scheduling

    def take_updated_requests(self) -> list[Request]:
        """Return the updated requests, each once, and clear the list."""
        updated, self.updated_requests = self.updated_requests, []
        return list(dict.fromkeys(updated))

    def process_output(self, step: LaunchedStep) -> None:
        """Apply what a step sampled to the requests that still have their rows; wait for it."""
        batch, output = self._batch, step.scheduler_output
        began = time.perf_counter()
        sampled = self._model_runner.tokens(step.handle)
        now = time.perf_counter()
        self._stats.wait_seconds += now - began
        rows = self._live_rows(output)
        wants_logprobs = batch.has_logprobs[rows].any()
        logprobs = self._model_runner.logprobs(step.handle) if wants_logprobs else None
        for row in rows[batch.host_sampled[rows]].tolist():
            self._sample_on_host(row, sampled, logprobs)
        rows = self._live_rows(output)
        for row in rows[sampled[rows] < 0].tolist():
            self.scheduler.cache.uncache(row)
            self.end_request(batch.request(row), "error", _NOT_FINITE)
        rows = self._live_rows(output)
        self._append_tokens(rows, sampled[rows], now, logprobs)

    def process_prompt_logprobs(self, output: SchedulerOutput) -> None:
        """Append the prompt logprobs of the step just launched; wait for it."""
        batch = output.batch
        assert isinstance(batch, PrefillBatch)
        found = self._model_runner.prompt_logprobs(len(batch.ids))
        # The output head has no logit for ids that are only embedded: their probability is 0.
        beyond = batch.logprob_targets >= self._vocab_size
        found.values[beyond, 0] = -np.inf
        found.ids[beyond, 0] = self._vocab_size + 1
        for chunk, begin in output.scored:
            request = self._batch.request(chunk.row)
            try:
                self._append_prompt_logprobs(request, batch, chunk, begin, found)
            except Exception as error:  # raised by the tokenizer
                self.end_request(request, "error", _describe(error))

    def end_request(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a running or waiting request, and free its row and blocks."""
        # The reason is set before the request leaves its row, so that recovery from an interrupt
        # in between reports the request.
        request.error = error
        request.finish_reason = reason
        if request in self._batch.requests:
            self.scheduler.release(self._batch.requests.index(request))
        else:
            self.scheduler.remove(request)
        self.updated_requests.append(request)

    def _live_rows(self, output: SchedulerOutput) -> Int64:
        """Return the rows of a step that still have the same requests as when it was scheduled."""
        live = self._batch.generation[output.rows] == output.generations
        rows: Int64 = output.rows[live]
        return rows

    def _append_tokens(
        self, rows: Int64, tokens: Int64, now: float, logprobs: Logprobs | None
    ) -> None:
        batch, cache = self._batch, self.scheduler.cache
        stops = batch.append_tokens(rows, tokens, now)
        ends = stops | (batch.num_tokens[rows] >= batch.max_num_tokens[rows])
        for number in np.flatnonzero(batch.needs_host_update[rows]).tolist():
            self._update_request(int(rows[number]), int(tokens[number]), logprobs)
        for number in np.flatnonzero(ends).tolist():
            request = batch.requests[rows[number]]
            if request is not None:  # a stop string or an error may have ended it
                self.end_request(request, "stop" if stops[number] else "length")
        for row in rows[(batch.num_tokens[rows] - 1) % cache.block_size == 0].tolist():
            if batch.requests[row] is not None:
                cache.cache_full_blocks(row, batch.tokens[row, : batch.num_tokens[row] - 1])

    def _update_request(self, row: int, token: int, logprobs: Logprobs | None) -> None:
        """Append one token to its request; a failure ends this request only."""
        request = self._batch.request(row)
        request.token_ids.append(token)
        self.updated_requests.append(request)
        try:
            if request.logprobs is not None and logprobs is not None:
                values, ids = logprobs.values[row], logprobs.ids[row]
                count = request.sampling_params.logprobs
                request.logprobs.append(self._logprobs(token, values, ids, count))
            detokenizer = request.detokenizer
            stops = detokenizer is not None and detokenizer.push([token])
        except Exception as error:
            self.end_request(request, "error", _describe(error))
            return
        if stops or token in request.stop_token_ids:
            self.end_request(request, "stop")

    def _sample_on_host(
        self, row: int, sampled: NDArray[np.int64], logprobs: Logprobs | None
    ) -> None:
        """Apply the request's logits processors, and replace the token sampled in its row."""
        request, model_runner = self._batch.request(row), self._model_runner
        tokens = self._batch.tokens[row, : self._batch.num_tokens[row]]
        logits = model_runner.logits(row)
        self._stats.processor_calls += 1
        try:
            logits = apply_logits_processors(request, tokens, logits)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, too, ends the request only
            self.end_request(request, "error", _describe(error))
            return
        sampled[row], found = model_runner.sample_from_logits(row, logits)
        if logprobs is not None:
            logprobs.values[row], logprobs.ids[row] = found

    def _append_prompt_logprobs(
        self, request: Request, batch: PrefillBatch, chunk: Chunk, begin: int, found: Logprobs
    ) -> None:
        assert request.prompt_logprobs is not None
        if chunk.start == 0:
            request.prompt_logprobs.append(None)
        count = request.sampling_params.prompt_logprobs
        for at in range(begin, begin + chunk.count):
            if batch.num_logprobs[at] >= 0:
                token, values, ids = int(batch.logprob_targets[at]), found.values[at], found.ids[at]
                request.prompt_logprobs.append(self._logprobs(token, values, ids, count))

    def _logprobs(
        self, token: int, values: NDArray[np.float32], ids: Int64, count: int | None
    ) -> dict[int, Logprob]:
        """Return by token id the logprobs of a token and of the most likely ones.

        Args:
            token: the token that was sampled or given.
            values: [1 + M] float32, its logprob and the top ones (see `passes.ops.top_logprobs`).
            ids: [1 + M] int64, its rank and the top token ids.
            count: number of top logprobs requested, at most M.
        """
        ranks = [int(ids[0]), *range(1, (count or 0) + 1)]
        tokens = [token, *ids[1 : len(ranks)].tolist()]
        found: dict[int, Logprob] = {}
        for candidate, value, rank in zip(tokens, values.tolist(), ranks, strict=False):
            if candidate not in found:
                text = self._decode_token(candidate) if self._decode_token is not None else None
                found[candidate] = Logprob(logprob=value, rank=rank, decoded_token=text)
        return found


def merge_requests(*lists: Sequence[Request]) -> list[Request]:
    """Concatenate lists of requests, and keep the first of equal ones."""
    return list(dict.fromkeys(request for requests in lists for request in requests))


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
