"""The asynchronous API: one thread owns the engine, and tasks of any number of event loops and threads share it."""

import asyncio
import atexit
import copy
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, Unpack

from compiled_llm.engine.processor import RequestGroup, raise_failure
from compiled_llm.engine.prompts import Message, Prompt
from compiled_llm.engine_thread import Channel, EngineThread
from compiled_llm.llm import CompiledLLM, LoadOptions
from compiled_llm.outputs import RequestOutput
from compiled_llm.report.report import Report
from compiled_llm.sampling_params import SamplingParams

T = TypeVar("T")
Input = Prompt | Sequence[Message]


class AsyncCompiledLLM:
    """A CompiledLLM for asyncio: requests join and leave at any step. Its methods may be called from any thread.

    The thread that runs it does not keep the interpreter from exiting: what was not closed by then is closed at exit.

    Args:
        make: makes the CompiledLLM, in the thread that will own it (what torch keeps for each thread, such as the current
            CUDA device, is to be set in there). The constructor waits for it, and raises what it raises.
    """

    def __init__(self, make: Callable[[], CompiledLLM]) -> None:
        self._thread = EngineThread(make)
        self._tokenizing = ThreadPoolExecutor(
            1, "compiled-llm-tokenizing"
        )  # a single thread keeps prompts in their order
        atexit.register(self.close)

    @classmethod
    def from_pretrained(
        cls, model: str | Path | None = None, **options: Unpack[LoadOptions]
    ) -> Self:
        """Load a model and compile it, as `CompiledLLM.from_pretrained` does; blocks until it is ready."""
        return cls(partial(CompiledLLM.from_pretrained, model, **options))

    @classmethod
    async def start(cls, model: str | Path | None = None, **options: Unpack[LoadOptions]) -> Self:
        """`from_pretrained`, without blocking the event loop."""
        return await asyncio.to_thread(cls.from_pretrained, model, **options)

    async def add(
        self,
        prompt: Input,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        streaming: bool = True,
    ) -> "RequestStream":
        """Let a request wait for its turn, and return the stream of its outputs.

        Args:
            prompt: text, token ids or a conversation.
            params: by default the checkpoint's.
            request_id: one that no running request has; None makes one up.
            priority: lower numbers go first.
            streaming: an output for each step that brought something; False gives a single one, at the end, and is cheaper.

        Raises:
            ValueError: the request cannot be served; nothing was run.
            QueueFullError: as many requests wait as `limits.max_waiting` allows; nothing was run.
        """
        loop, llm = asyncio.get_running_loop(), self._thread.llm
        jobs, engine = llm.jobs, llm.engine
        name = request_id or uuid.uuid4().hex

        def make() -> RequestGroup:
            """Refuse what the engine would, before its text is tokenised, and out of the engine's thread."""
            engine.check_room(getattr(params, "n", jobs.default_params.n))
            job = jobs.make(prompt, params, priority=priority, streaming=streaming, request_id=name)
            engine.check(job.requests[0])
            return job

        channel = Channel(
            job=await loop.run_in_executor(self._tokenizing, make), loop=loop, streaming=streaming
        )
        stream = RequestStream(channel, self._thread.abort_soon)
        try:
            await self._run(partial(self._thread.enter, channel))
        except BaseException:
            stream.close()  # whoever is cancelled here does not know whether the request has entered
            raise
        return stream

    async def generate(
        self,
        prompt: Input,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """`add` as a generator: its first iteration raises what `add` does, and closing it aborts the request."""
        async with await self.add(
            prompt, params, request_id=request_id, priority=priority
        ) as outputs:
            async for output in outputs:
                yield output

    async def stream(
        self,
        prompt: Input,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[str, None]:
        """One completion's text in pieces: no character is split, and nothing is given that a stop string takes back."""
        self._thread.llm.jobs.check_stream(params)
        given = 0
        async with await self.add(
            prompt, params, request_id=request_id, priority=priority
        ) as outputs:
            async for output in outputs:
                if len(output.text) > given:
                    yield output.text[given:]
                    given = len(output.text)
            outputs.raise_failure()

    async def abort(self, request_id: str) -> None:
        """End a request: its stream gives what has come, with the finish reason `abort`. An unknown or ended one is no error.

        When this returns, the request's pages are free.
        """
        await self._run(partial(self._thread.abort_named, request_id))

    async def call(self, function: Callable[[CompiledLLM], T]) -> T:
        """What a function of the CompiledLLM gives or raises; the engine's thread runs it between two steps. It must take none."""
        return await self._run(lambda: function(self._thread.llm))

    async def report(self) -> Report:
        """Phases, buckets, passes, fallbacks and graph events so far; a copy."""
        return await self.call(lambda llm: copy.deepcopy(llm.report()))

    async def reset_prefix_cache(self) -> None:
        """Share nothing of what was computed so far with prompts to come."""
        await self.call(CompiledLLM.reset_prefix_cache)

    def close(self) -> None:
        """Abort all requests, free the caches and graphs, and wait until that is done. A second call does nothing."""
        if self._thread.forked:
            return  # the thread is the parent's
        self._thread.close()
        self._tokenizing.shutdown(wait=False)
        atexit.unregister(self.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.close)

    async def _run(self, command: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._thread.submit(command))


class RequestStream:
    """A request's outputs: each is all that has come by then, and the last is `finished`. For one consumer.

    An output that was not taken before the next one came is left out: a slow consumer holds up nobody, and misses no token.
    Closing the stream, leaving its `async with`, cancelling a task that waits for its next output, and dropping it abort the
    request, and its pages are free before the next step.
    """

    def __init__(self, channel: Channel, abort: Callable[[Channel], None]) -> None:
        self._channel, self._abort, self._over = channel, abort, False

    @property
    def request_id(self) -> str:
        """The request's, given or made up."""
        return self._channel.request_id

    def raise_failure(self) -> None:
        """Raise a RuntimeError if something ended the request before its time."""
        for request in self._channel.job.requests:
            raise_failure(request)

    def close(self) -> None:
        """Take no more, and abort the request if it has not ended; from any thread."""
        if not self._over:
            self._over = True
            self._abort(self._channel)

    async def aclose(self) -> None:
        """`close`, for `contextlib.aclosing`."""
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._over:
            raise StopAsyncIteration
        try:
            item = await self._channel.take()
        except BaseException:
            self.close()
            raise
        self._over = isinstance(item, BaseException) or item.finished
        if isinstance(item, BaseException):
            raise item
        return item

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
