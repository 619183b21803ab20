"""Requests to batches: as many requests as rows and pages allow run as one batch, then the next ones."""

import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compiled_llm.engine.block_pool import BlockPool
from compiled_llm.engine.request import Request
from compiled_llm.runtime.runtime import Runtime
from compiled_llm.runtime.state import PrefillChunk


@dataclass(slots=True)
class _Row:
    """A running request, its pages, and how many of its prompt's tokens are cached."""

    request: Request
    pages: list[int]
    cached: int = 0

    @property
    def remaining(self) -> int:
        return len(self.request.prompt_token_ids) - self.cached


class Engine:
    """Runs requests on a runtime, first come first served.

    Args:
        runtime: a started runtime.
        vocab_size: token ids must be below it.
        eos_token_ids: ids that end a request which does not ignore them.
    """

    def __init__(self, runtime: Runtime, *, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._runtime, self._vocab_size, self._eos = runtime, vocab_size, eos_token_ids
        self._max_model_len = runtime.limits.max_model_len
        self._running = False
        self._pool = BlockPool(runtime.memory.num_pages, runtime.memory.block_size)

    def check(self, request: Request) -> None:
        """Refuse what cannot be served, before anything reaches the device; raises ValueError."""
        prompt = request.prompt_token_ids
        if not prompt:
            raise ValueError("the prompt is empty: expected at least one token")
        if len(prompt) >= self._max_model_len:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, which limits.max_model_len={self._max_model_len} leaves no answer to: "
                f"shorten it to {self._max_model_len - 1} or raise the limit"
            )
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < self._vocab_size:
                raise ValueError(f"token id {token} is out of range: the model's vocabulary has ids 0 to {self._vocab_size - 1}")

    def run(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Run checked requests to their ends; yields, after each step, those that got a token.

        Raises:
            RuntimeError: an earlier run is still open; it ends when its iterator is exhausted or closed.
        """
        if self._running:
            raise RuntimeError("a stream is still open on this engine: exhaust it or close it first")
        self._running = True
        try:
            waiting = deque(requests)
            while waiting:
                yield from self._run_batch(waiting)
        finally:
            self._running = False

    def _admit(self, waiting: deque[Request]) -> list[_Row]:
        """Take requests from the front while there are rows, and pages for all that each may ever hold."""
        rows: list[_Row] = []
        while waiting and len(rows) < self._runtime.limits.max_num_seqs:
            request = waiting[0]
            num_tokens = len(request.prompt_token_ids) + request.max_tokens(self._max_model_len)
            num_pages = self._pool.pages_for(num_tokens)
            if num_pages > self._pool.num_free:
                break
            rows.append(_Row(waiting.popleft(), self._pool.allocate(num_pages)))
        return rows

    def _run_batch(self, waiting: deque[Request]) -> Iterator[list[Request]]:
        """Admit a batch and run it to the end of its last request, or until the iterator is closed."""
        rows = self._admit(waiting)
        try:
            self._join(rows)
            self._prefill(rows)
            yield from self._decode(rows)
        finally:
            for row in rows:
                self._pool.free(row.pages)
            self._runtime.leave(range(len(rows)))

    def _join(self, rows: list[_Row]) -> None:
        for number, row in enumerate(rows):
            params = row.request.params
            seed = secrets.randbits(63) if params.seed is None else params.seed
            self._runtime.join(number, pages=row.pages, temperature=params.temperature, seed=seed)

    def _prefill(self, rows: list[_Row]) -> None:
        while chunks := self._next_chunks(rows):
            self._runtime.prefill(chunks)
        self._runtime.activate(range(len(rows)))

    def _decode(self, rows: list[_Row]) -> Iterator[list[Request]]:
        running = dict(enumerate(rows))
        while running:
            tokens = self._runtime.tokens(max(running) + 1)
            for number, row in running.items():
                row.request.append(tokens[number], eos_token_ids=self._eos, max_model_len=self._max_model_len)
            yield [row.request for row in running.values()]
            ended = [number for number, row in running.items() if row.request.finish_reason is not None]
            if ended:
                self._runtime.leave(ended)
            running = {number: row for number, row in running.items() if number not in ended}
            if running:
                self._runtime.decode(max(running) + 1)

    def _next_chunks(self, rows: list[_Row]) -> list[PrefillChunk]:
        """Prompt tokens not cached yet, in order of the rows, up to the budget of one step."""
        budget, chunks = self._runtime.limits.max_num_batched_tokens, []
        for number, row in enumerate(rows):
            count = min(row.remaining, budget)
            if count:
                tokens = row.request.prompt_token_ids[row.cached : row.cached + count]
                chunks.append(PrefillChunk(row=number, tokens=tokens, start=row.cached))
                row.cached += count
                budget -= count
        return chunks
