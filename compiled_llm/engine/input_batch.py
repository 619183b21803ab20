"""The running requests as arrays over the runtime's rows, so that a decode step loops over no request.

Shapes: R rows, L tokens a sequence at most, C sampling parameters.
"""

import numpy as np
from numpy.typing import NDArray

from compiled_llm.config.schema import Sampler
from compiled_llm.engine.request import Request
from compiled_llm.engine.sampling_rows import pack_params
from compiled_llm.runtime.buckets import SAMPLERS
from compiled_llm.runtime.step.batch_inputs import RECENT
from compiled_llm.runtime.step.sampler import SamplingTensors

_MAX_STOP_IDS = 16


class InputBatch:
    """What the host knows of each row, [R] int64 unless another shape is given.

    Attributes:
        requests: who has the row, or None.
        owner: a number that changes whenever the row changes hands.
        tokens: [R, L] int32, prompt and output; known: how many of them are known.
        computed: how many tokens' keys and values the steps launched so far compute.
        target: how many tokens are prefilled before the first is sampled.
        remaining: how many tokens are still to be sampled by steps not launched yet.
        decoding: bool, rows that the next decode step serves.
        sampler: index in `SAMPLERS`; params: [R, C].
        lift_at: what `remaining` is when `min_tokens` no longer bans the stopping tokens; -1 for never.
        limit: how many tokens the sequence has when its request has all that it may generate.
        watched: bool, rows whose tokens are looked at one by one; logprobs: bool, rows that want some; external: bool, rows whose
            tokens are chosen on the host.
        stop_ids: [R, 16] ids that end the row's request, -1 where there are no more.
        first_at, last_at: float64, seconds, when the first and the last token came; NaN before.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        self.requests: list[Request | None] = [None] * max_num_seqs
        self.free = list(range(max_num_seqs - 1, -1, -1))
        self.prefilling: list[
            int
        ] = []  # rows whose prompt is not computed yet, in the order of admission
        self.tokens = np.zeros((max_num_seqs, max_model_len), np.int32)
        self.params = np.zeros((max_num_seqs, len(SamplingTensors._fields)), np.int64)
        self.stop_ids = np.full((max_num_seqs, _MAX_STOP_IDS), -1, np.int64)
        self.decoding = np.zeros(max_num_seqs, bool)
        self.watched = np.zeros(max_num_seqs, bool)
        self.logprobs = np.zeros(max_num_seqs, bool)
        self.external = np.zeros(max_num_seqs, bool)
        self.first_at = np.full(max_num_seqs, np.nan)
        self.last_at = np.full(max_num_seqs, np.nan)
        integers = np.zeros((8, max_num_seqs), np.int64)
        (
            self.owner,
            self.known,
            self.computed,
            self.target,
            self.remaining,
            self.limit,
            self.sampler,
            self.lift_at,
        ) = integers
        self.lift_at[:] = -1

    @property
    def running(self) -> list[int]:
        """Rows that somebody has."""
        return [row for row, request in enumerate(self.requests) if request is not None]

    def request(self, row: int) -> Request:
        """Who has the row, which somebody has."""
        request = self.requests[row]
        assert request is not None
        return request

    def take(self, row: int, request: Request, num_cached: int) -> None:
        """A request takes the free row, with so many of its tokens computed already."""
        tokens = [*request.prompt_token_ids, *request.token_ids]
        generated = len(request.token_ids)
        self.free.remove(row)
        self.requests[row] = request
        self.prefilling.append(row)
        self.tokens[row, : len(tokens)] = tokens
        self.params[row] = pack_params(request)
        self.owner[row] += 1
        self.known[row] = self.target[row] = len(tokens)
        self.computed[row] = num_cached
        self.remaining[row] = request.max_tokens - generated
        self.limit[row] = len(request.prompt_token_ids) + request.max_tokens
        self.sampler[row] = SAMPLERS.index(request.params.sampler)
        lifts = generated < request.params.min_tokens
        self.lift_at[row] = request.max_tokens - request.params.min_tokens if lifts else -1
        stop_ids = sorted(request.stop_token_ids)
        self.stop_ids[row] = -1
        self.stop_ids[row, : len(stop_ids)] = stop_ids[:_MAX_STOP_IDS]
        self.watched[row] = request.watched or len(stop_ids) > _MAX_STOP_IDS
        self.logprobs[row] = request.params.logprobs is not None
        self.external[row] = bool(request.params.logits_processors)
        self.first_at[row] = (
            np.nan if request.timings.first_token is None else request.timings.first_token
        )
        self.last_at[row] = (
            np.nan if request.timings.last_token is None else request.timings.last_token
        )

    def leave(self, row: int) -> Request:
        """The row is free again; its request keeps what is known."""
        request = self.request(row)
        request.token_ids = self.tokens[
            row, len(request.prompt_token_ids) : self.known[row]
        ].tolist()
        request.timings.first_token = (
            None if np.isnan(self.first_at[row]) else float(self.first_at[row])
        )
        request.timings.last_token = (
            None if np.isnan(self.last_at[row]) else float(self.last_at[row])
        )
        self.requests[row] = None
        self.owner[row] += 1
        self.decoding[row], self.lift_at[row] = False, -1
        if row in self.prefilling:
            self.prefilling.remove(row)
        self.free.append(row)
        return request

    def launch(self, rows: NDArray[np.int64], num_tokens: NDArray[np.int64] | int) -> None:
        """A step that computes the next tokens of these rows is about to be launched."""
        self.computed[rows] += num_tokens

    def sample(self, rows: NDArray[np.int64]) -> None:
        """That step samples a token in each of these rows; those with none left to sample decode no more."""
        self.remaining[rows] -= 1
        self.decoding[rows] = self.remaining[rows] > 0

    def learn(
        self, rows: NDArray[np.int64], tokens: NDArray[np.int64], now: float
    ) -> NDArray[np.bool_]:
        """The tokens sampled in these rows are known; True where one ends its request."""
        self.tokens[rows, self.known[rows]] = tokens
        self.known[rows] += 1
        self.last_at[rows] = now
        self.first_at[rows] = np.where(np.isnan(self.first_at[rows]), now, self.first_at[rows])
        stops: NDArray[np.bool_] = (tokens[:, None] == self.stop_ids[rows]).any(1)
        return stops

    def batch_sampler(self, rows: NDArray[np.int64]) -> Sampler:
        """The cheapest sampler that serves these rows together."""
        return SAMPLERS[int(self.sampler[rows].max(initial=0))]

    def recent(self, row: int) -> NDArray[np.int64]:
        """The last tokens known, [RECENT], -1 where there are none."""
        recent = np.full(RECENT, -1, np.int64)
        tokens = self.tokens[row, max(0, self.known[row] - RECENT) : self.known[row]]
        recent[RECENT - len(tokens) :] = tokens
        return recent
