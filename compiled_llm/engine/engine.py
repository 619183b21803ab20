"""The engine: accepts requests, runs steps, and recovers from interrupted ones."""

from collections import deque
from collections.abc import Callable

from compiled_llm.engine.engine_core import EngineCore
from compiled_llm.engine.kv_cache_manager import KVCacheManager
from compiled_llm.engine.model_runner_protocol import ModelRunnerProtocol
from compiled_llm.engine.output_processor import merge_requests
from compiled_llm.engine.recovery import RecoverableEngine, changes_engine, move_unfinished
from compiled_llm.engine.request import Request
from compiled_llm.engine.request_validation import validate
from compiled_llm.errors import QueueFullError


class Engine(RecoverableEngine):
    """Runs requests on a model runner with continuous batching.

    Args:
        model_runner: runs the steps; the engine may be called in its thread only.
        vocab_size: number of token ids that the model generates (rows of the output head).
        num_embeddings: number of token ids that a prompt may hold (rows of the input embedding);
            `vocab_size` by default.
        decode_token: returns the text of one token, for logprobs.
    """

    def __init__(
        self,
        model_runner: ModelRunnerProtocol,
        *,
        vocab_size: int,
        num_embeddings: int | None = None,
        decode_token: Callable[[int], str] | None = None,
    ) -> None:
        super().__init__(model_runner)
        self._vocab_size = vocab_size
        self._num_embeddings = vocab_size if num_embeddings is None else num_embeddings
        self._decode_token = decode_token
        self._max_waiting = model_runner.config.limits.max_waiting
        self._core = self._make_core()
        self._to_abort: deque[Request] = deque()  # by the next step

    @property
    def cache(self) -> KVCacheManager:
        """Blocks of the running requests."""
        return self._core.scheduler.cache

    @property
    def num_waiting(self) -> int:
        """Number of requests in the queue."""
        return self._core.scheduler.num_waiting

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._core.has_work or bool(self._to_abort) or not self._consistent

    @property
    def can_queue(self) -> bool:
        """Whether one more request may wait."""
        return self._can_queue(1)

    def check_queue(self, count: int = 1) -> None:
        """Raise unless `count` more requests may wait. In other threads this is an estimate.

        Raises:
            ValueError: `count` exceeds the limits even with an empty queue.
            QueueFullError: too many others wait.
        """
        limit, num_rows = self._max_waiting, len(self._core.batch.requests)
        if limit is not None and count > limit + num_rows:
            raise ValueError(
                f"n must be at most {limit + num_rows} here, got {count}: at most "
                f"limits.max_num_seqs={num_rows} run and limits.max_waiting={limit} wait"
            )
        if not self._can_queue(count):
            reason = (
                "as many as limits.max_waiting allows"
                if count == 1
                else f"{count} more exceed limits.max_waiting={limit}"
            )
            raise QueueFullError(
                f"{self.num_waiting} requests are waiting, {reason}: retry later or raise it"
            )

    def validate(self, request: Request) -> None:
        """Raise ValueError if the request cannot be served; nothing reaches the device."""
        validate(
            request,
            vocab_size=self._vocab_size,
            num_embeddings=self._num_embeddings,
            max_model_len=self._model_runner.limits.max_model_len,
        )
        params = request.sampling_params
        scoring = params.prompt_logprobs is not None
        self._model_runner.check_samplers(params.sampler, scoring=scoring)

    @changes_engine
    def add_request(self, request: Request) -> None:
        """Add a validated request to the queue.

        Raises:
            QueueFullError: the queue is full.
            EngineBrokenError: an earlier call failed and the engine could not recover.
            RuntimeError: the model has changed, or this is called in another thread or in a step.
        """
        self._enter()
        self.check_queue()
        # Checking the model takes longer than the rest, so it is done once for a batch of requests.
        if not self.has_work:
            self._model_runner.check_model()
        with self._changing():
            self._core.scheduler.add_request(request)

    @changes_engine
    def abort(self, request: Request) -> None:
        """End a request, unless it has ended.

        Its row and blocks are free when this returns. If it is called in another thread, or in a
        step by a finalizer or a logits processor, they are free before the next step.
        """
        if request.finish_reason is not None:
            return
        if self._broken is not None:
            request.error = self._broken
            request.finish_reason = "error"
        elif self._is_nested() or not self._model_runner.is_owner:
            self._to_abort.append(request)
        else:
            with self._changing():
                self._abort_unfinished(request)  # recovery may have ended it

    @changes_engine
    def reset_prefix_cache(self) -> None:
        """Drop all cached prefix blocks."""
        with self._changing():
            self.cache.reset_prefix_cache()

    @changes_engine
    def step(self) -> list[Request]:
        """Launch the next step, and process the output of the previous one.

        Returns:
            The requests that ended, and those with `needs_host_update` that got tokens.

        Raises:
            EngineBrokenError: an earlier call failed and the engine could not recover.
            Exception: an exception of the step. The next call recovers: requests that were running
                end with an error.
        """
        with self._changing():
            while self._to_abort:
                self._abort_unfinished(self._to_abort.popleft())
            updated = self._core.step()
            self._num_futile = 0
            return updated

    def _abort_unfinished(self, request: Request) -> None:
        if request.finish_reason is None:
            self._core.outputs.end_request(request, "abort")

    def _can_queue(self, count: int) -> bool:
        limit = self._max_waiting
        return limit is None or self.num_waiting + count <= limit + len(self._core.batch.free)

    def _make_core(self) -> EngineCore:
        return EngineCore(self._model_runner, self._vocab_size, self._decode_token)

    def _restart(self, error: str) -> list[Request]:
        old, new = self._core, self._make_core()
        ended = move_unfinished(old.scheduler, new.scheduler, error)
        new.outputs.updated_requests = merge_requests(old.outputs.updated_requests, ended)
        self._core = new  # a single assignment, so that an interrupt leaves the old or the new core
        return ended

    def _unfinished(self) -> list[Request]:
        return self._core.scheduler.unfinished
