"""Running requests as arrays over the rows of the batch.

With arrays, a decode step runs no Python loop over requests.

Shapes: R rows, L tokens of a sequence at most, C packed sampling parameters.
"""

import numpy as np
from numpy.typing import NDArray

from compiled_llm.config.schema import Sampler
from compiled_llm.engine.request import Request
from compiled_llm.engine.sampling_metadata import (
    make_bias,
    make_sampler_state,
    pack_sampling_params,
)
from compiled_llm.runtime.buckets import SAMPLERS
from compiled_llm.runtime.step.batch_inputs import RECENT
from compiled_llm.runtime.step.sampler import SamplingTensors
from compiled_llm.runtime.step.sampler_state import SamplerState

_MAX_STOP_IDS = 16


class InputBatch:
    """The host's state of each row.

    Args:
        max_num_seqs: R.
        max_model_len: L.
        vocab_size: number of token ids that the model generates.

    Attributes:
        requests: the request of each row, or None.
        free: rows without a request.
        prefilling: rows whose prompt is not fully computed, in the order of admission.
        tokens: [R, L] int32; tokens of the prompt and the completion.
        params: [R, C] int64; packed sampling parameters.
        sampler_updates: by row, sampler state that must be written before the next step.
        stop_token_ids: [R, 16] int64; ids that end the request, padded with -1.
        first_token_time: [R] float64; seconds, NaN before the first token; `last_token_time` alike.
        decoding: [R] bool; rows that take part in the next decode step.
        needs_host_update: [R] bool; rows whose tokens are processed one by one.
        has_logprobs: [R] bool; rows whose requests want logprobs.
        host_sampled: [R] bool; rows whose tokens are sampled after logits processors ran.
        generation: [R] int64; changes whenever a request enters or leaves the row.
        num_tokens: [R] int64; tokens that are known.
        num_computed_tokens: [R] int64; tokens whose keys and values the launched steps compute.
        num_prefill_tokens: [R] int64; tokens to compute before the first one is sampled.
        num_remaining: [R] int64; tokens to be sampled by steps that are not launched yet.
        max_num_tokens: [R] int64; tokens of the sequence at its length limit.
        sampler: [R] int64; index in `SAMPLERS`.
        min_tokens_reached_at: [R] int64; value of `num_remaining` from which on stop tokens are
            allowed; -1 for never.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.requests: list[Request | None] = [None] * max_num_seqs
        self.free = list(range(max_num_seqs - 1, -1, -1))
        self.prefilling: list[int] = []
        self.tokens = np.zeros((max_num_seqs, max_model_len), np.int32)
        self.params = np.zeros((max_num_seqs, len(SamplingTensors._fields)), np.int64)
        self.sampler_updates: dict[int, SamplerState] = {}
        self.stop_token_ids = np.full((max_num_seqs, _MAX_STOP_IDS), -1, np.int64)
        self.first_token_time = np.full(max_num_seqs, np.nan)
        self.last_token_time = np.full(max_num_seqs, np.nan)
        self.decoding = np.zeros(max_num_seqs, bool)
        self.needs_host_update = np.zeros(max_num_seqs, bool)
        self.has_logprobs = np.zeros(max_num_seqs, bool)
        self.host_sampled = np.zeros(max_num_seqs, bool)
        self.generation = np.zeros(max_num_seqs, np.int64)
        self.num_tokens = np.zeros(max_num_seqs, np.int64)
        self.num_computed_tokens = np.zeros(max_num_seqs, np.int64)
        self.num_prefill_tokens = np.zeros(max_num_seqs, np.int64)
        self.num_remaining = np.zeros(max_num_seqs, np.int64)
        self.max_num_tokens = np.zeros(max_num_seqs, np.int64)
        self.sampler = np.zeros(max_num_seqs, np.int64)
        self.min_tokens_reached_at = np.full(max_num_seqs, -1, np.int64)

    @property
    def running(self) -> list[int]:
        """Rows that have a request."""
        return [row for row, request in enumerate(self.requests) if request is not None]

    def request(self, row: int) -> Request:
        """Return the request of a row that has one."""
        request = self.requests[row]
        assert request is not None
        return request

    def add_request(self, row: int, request: Request, num_computed_tokens: int) -> None:
        """Put a request into a free row.

        Args:
            row: a free row.
            request: the request, with the tokens that it generated before a preemption.
            num_computed_tokens: tokens whose keys and values are in the prefix cache.
        """
        tokens = [*request.prompt_token_ids, *request.token_ids]
        self.free.remove(row)
        self.requests[row] = request
        self.prefilling.append(row)
        self.generation[row] += 1
        self.tokens[row, : len(tokens)] = tokens
        self.num_tokens[row] = self.num_prefill_tokens[row] = len(tokens)
        self.num_computed_tokens[row] = num_computed_tokens
        self.num_remaining[row] = request.max_tokens - len(request.token_ids)
        self.max_num_tokens[row] = len(request.prompt_token_ids) + request.max_tokens
        self.first_token_time[row] = _or_nan(request.timings.first_token)
        self.last_token_time[row] = _or_nan(request.timings.last_token)
        self._set_stop_tokens(row, request)
        self._set_sampling_params(row, request)

    def remove_request(self, row: int) -> Request:
        """Free the row and write its tokens and times back to its request."""
        request = self.request(row)
        begin, end = len(request.prompt_token_ids), self.num_tokens[row]
        request.token_ids = self.tokens[row, begin:end].tolist()
        request.timings.first_token = _or_none(self.first_token_time[row])
        request.timings.last_token = _or_none(self.last_token_time[row])
        self.requests[row] = None
        self.generation[row] += 1
        self.decoding[row] = False
        self.min_tokens_reached_at[row] = -1
        self.sampler_updates.pop(row, None)
        if row in self.prefilling:
            self.prefilling.remove(row)
        self.free.append(row)
        return request

    def lift_stop_token_bans(self) -> None:
        """Allow stop tokens in the rows that have just reached `min_tokens`."""
        for row in np.flatnonzero(self.num_remaining == self.min_tokens_reached_at).tolist():
            self.min_tokens_reached_at[row] = -1
            bias = make_bias(self.request(row), self._vocab_size, min_tokens_reached=True)
            self.sampler_updates[row] = SamplerState(bias=bias)

    def take_sampler_updates(self) -> dict[int, SamplerState]:
        """Return the sampler state to write before the next step, and forget it."""
        updates, self.sampler_updates = self.sampler_updates, {}
        return updates

    def mark_sampled(self, rows: NDArray[np.int64]) -> None:
        """Note that a step samples a token in each of these rows.

        A row without further tokens to sample leaves the decode steps.
        """
        self.num_remaining[rows] -= 1
        self.decoding[rows] = self.num_remaining[rows] > 0

    def append_tokens(
        self, rows: NDArray[np.int64], tokens: NDArray[np.int64], now: float
    ) -> NDArray[np.bool_]:
        """Append the token sampled in each of these rows; return where it is a stop token."""
        self.tokens[rows, self.num_tokens[rows]] = tokens
        self.num_tokens[rows] += 1
        self.last_token_time[rows] = now
        first = self.first_token_time[rows]
        self.first_token_time[rows] = np.where(np.isnan(first), now, first)
        stops: NDArray[np.bool_] = (tokens[:, None] == self.stop_token_ids[rows]).any(1)
        return stops

    def cheapest_sampler(self, rows: NDArray[np.int64]) -> Sampler:
        """Return the cheapest sampler that serves these rows together."""
        return SAMPLERS[int(self.sampler[rows].max(initial=0))]

    def recent_tokens(self, row: int) -> NDArray[np.int64]:
        """Return the last known tokens, [RECENT], padded with -1 in front."""
        recent = np.full(RECENT, -1, np.int64)
        end = self.num_tokens[row]
        tokens = self.tokens[row, max(0, end - RECENT) : end]
        recent[RECENT - len(tokens) :] = tokens
        return recent

    def _set_stop_tokens(self, row: int, request: Request) -> None:
        stop_ids = sorted(request.stop_token_ids)
        self.stop_token_ids[row] = -1
        self.stop_token_ids[row, : len(stop_ids)] = stop_ids[:_MAX_STOP_IDS]
        self.needs_host_update[row] = request.needs_host_update or len(stop_ids) > _MAX_STOP_IDS

    def _set_sampling_params(self, row: int, request: Request) -> None:
        params = request.sampling_params
        self.params[row] = pack_sampling_params(request)
        self.sampler[row] = SAMPLERS.index(params.sampler)
        self.has_logprobs[row] = params.logprobs is not None
        self.host_sampled[row] = bool(params.logits_processors)
        if len(request.token_ids) < params.min_tokens:
            self.min_tokens_reached_at[row] = request.max_tokens - params.min_tokens
        if params.sampler == "full":
            self.sampler_updates[row] = make_sampler_state(request, self._vocab_size)


def _or_nan(time: float | None) -> float:
    return np.nan if time is None else time


def _or_none(time: float) -> float | None:
    return None if np.isnan(time) else float(time)
