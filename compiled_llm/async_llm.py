"""Asynchronous Python API: one thread owns the engine and serves tasks of any event loop."""

import asyncio
import atexit
import copy
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Self, TypeVar, Unpack

from compiled_llm.engine.channel import Channel
from compiled_llm.engine.output_builder import RequestGroup, raise_failure
from compiled_llm.engine.prompts import Message, Prompt
from compiled_llm.engine_thread import EngineThread
from compiled_llm.llm import CompiledLLM, LoadOptions
from compiled_llm.outputs import RequestOutput
from compiled_llm.report.report import Report
from compiled_llm.sampling_params import SamplingParams

T = TypeVar("T")
Input = Prompt | Sequence[Message]


class AsyncCompiledLLM:
    """A CompiledLLM for asyncio; requests join and leave the batch at any step.

    The methods may be called in any thread. The engine's thread is a daemon thread, so it does not
    keep the interpreter from exiting; an engine that is not closed by then is closed at exit.

    Args:
        make: makes the CompiledLLM, in the thread that will own it. State that torch keeps for
            each thread, such as the current CUDA device, must be set there. The constructor waits
            for it, and raises its exceptions.
    """

    def __init__(self, make: Callable[[], CompiledLLM]) -> None:
        self._thread = EngineThread(make)
        # A single thread keeps prompts in their order.
        self._tokenizer_thread = ThreadPoolExecutor(1, "compiled-llm-tokenizing")
        atexit.register(self.close)

    @classmethod
    def from_pretrained(
        cls, model: str | Path | None = None, **options: Unpack[LoadOptions]
    ) -> Self:
        """Load a model and compile it, as `CompiledLLM.from_pretrained` does; blocks until ready.

        Args:
            model: as for `CompiledLLM.from_pretrained`.
            options: `config`, `artifact` and `progress`, as for `CompiledLLM.from_pretrained`.
        """
        return cls(partial(CompiledLLM.from_pretrained, model, **options))

    @classmethod
    async def start(cls, model: str | Path | None = None, **options: Unpack[LoadOptions]) -> Self:
        """Load a model and compile it, without blocking the event loop; see `from_pretrained`."""
        return await asyncio.to_thread(cls.from_pretrained, model, **options)

    async def add_request(
        self,
        prompt: Input,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        streaming: bool = True,
    ) -> "RequestStream":
        """Add a request to the queue, and return the stream of its outputs.

        Args:
            prompt: text, token ids or a conversation.
            sampling_params: the checkpoint's defaults if None.
            request_id: a name that no running request has; None for a generated one.
            priority: lower numbers are scheduled first.
            streaming: whether to return an output after each step that changed it. False returns
                a single one, at the end, at a lower cost.

        Raises:
            ValueError: the request cannot be served; nothing was run.
            QueueFullError: `limits.max_waiting` requests wait already; nothing was run.
        """
        loop, llm = asyncio.get_running_loop(), self._thread.llm
        runner, engine = llm._runner, llm.engine
        default_n = llm.default_sampling_params.n

        def make_group() -> RequestGroup:
            # The queue is checked first, because tokenizing a refused prompt would be wasted.
            engine.check_queue(getattr(sampling_params, "n", default_n))
            return runner.make_group(
                prompt,
                sampling_params,
                priority=priority,
                streaming=streaming,
                request_id=request_id or uuid.uuid4().hex,
            )

        group = await loop.run_in_executor(self._tokenizer_thread, make_group)
        channel = Channel(group=group, loop=loop, streaming=streaming)
        stream = RequestStream(channel, self._thread.abort_soon)
        try:
            await self._run(partial(self._thread.add_requests, channel))
        except BaseException:
            # If this task is cancelled, the request may have been added or not.
            stream.close()
            raise
        return stream

    async def generate(
        self,
        prompt: Input,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Add a request, and yield its outputs; each contains the whole text so far.

        The first iteration raises what `add_request` raises. Closing the generator aborts the
        request.
        """
        async with await self.add_request(
            prompt, sampling_params, request_id=request_id, priority=priority
        ) as outputs:
            async for output in outputs:
                yield output

    async def stream(
        self,
        prompt: Input,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[str, None]:
        """Add a request, and yield the text of its completion in pieces.

        No piece ends within a character, and no text is yielded that a stop string removes.
        """
        self._thread.llm._runner.processor.check_stream(sampling_params)
        num_yielded = 0
        async with await self.add_request(
            prompt, sampling_params, request_id=request_id, priority=priority
        ) as outputs:
            async for output in outputs:
                if len(output.text) > num_yielded:
                    yield output.text[num_yielded:]
                    num_yielded = len(output.text)
            outputs.raise_failure()

    async def abort(self, request_id: str) -> None:
        """End a request; its stream returns the output so far, with the finish reason `abort`.

        The request's blocks are free when this returns. Unknown and finished requests are ignored.
        """
        await self._run(partial(self._thread.abort_by_id, request_id))

    async def call(self, function: Callable[[CompiledLLM], T]) -> T:
        """Call a function with the CompiledLLM, in the engine's thread between two steps.

        The function must not run steps.

        Returns:
            What the function returns; its exceptions are raised.
        """
        return await self._run(lambda: function(self._thread.llm))

    async def report(self) -> Report:
        """Return a copy of phases, buckets, passes, fallbacks and graph events so far."""
        return await self.call(lambda llm: copy.deepcopy(llm.report()))

    async def reset_prefix_cache(self) -> None:
        """Drop all cached prefix blocks."""
        await self.call(CompiledLLM.reset_prefix_cache)

    def close(self) -> None:
        """Abort all requests, free the caches and graphs, and wait until that is done. Idempotent.

        In a forked process, which does not run the engine's thread, this has no effect.
        """
        if self._thread.forked:
            return
        self._thread.close()
        self._tokenizer_thread.shutdown(wait=False)
        atexit.unregister(self.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    async def _run(self, command: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._thread.submit(command))


class RequestStream:
    """Outputs of a request, for one consumer.

    Each output contains everything so far, and the last one is `finished`. An output that was not
    taken before the next one is replaced by it, so a slow consumer delays no other request and
    misses no token. Closing the stream, leaving its `async with`, cancelling a task that waits for
    the next output, and deleting the stream abort the request; its blocks are free before the next
    step.
    """

    def __init__(self, channel: Channel, abort: Callable[[Channel], None]) -> None:
        self._channel = channel
        self._abort = abort
        self._ended = False

    @property
    def request_id(self) -> str:
        """Name of the request, given or generated."""
        return self._channel.request_id

    def raise_failure(self) -> None:
        """Raise RequestFailedError, a RuntimeError, if the request failed."""
        for request in self._channel.group.requests:
            raise_failure(request)

    def close(self) -> None:
        """End the stream, and abort the request if it is unfinished; from any thread."""
        if not self._ended:
            self._ended = True
            self._abort(self._channel)

    async def aclose(self) -> None:
        """End the stream, as `close` does; for `contextlib.aclosing`."""
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        try:
            item = await self._channel.take()
        except BaseException:
            self.close()
            raise
        self._ended = isinstance(item, BaseException) or item.finished
        if isinstance(item, BaseException):
            raise item
        return item

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
