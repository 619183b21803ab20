"""The thread that owns an engine, and the way from it to those who wait in event loops."""

import asyncio
import os
import traceback
import warnings
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from compiled_llm.engine.engine import Engine
from compiled_llm.engine.processor import RequestGroup
from compiled_llm.engine.request import Request
from compiled_llm.errors import EngineBrokenError
from compiled_llm.llm import CompiledLLM
from compiled_llm.outputs import RequestOutput

T = TypeVar("T")


@dataclass(slots=True, kw_only=True, eq=False)
class Channel:
    """A job's way from the engine's thread to its consumer, with room for one output, or the error that ended the thread.

    Attributes:
        latest: filled by the thread, emptied by the consumer.
        notified: `arrived`, which belongs to the loop, is about to be set there.
        settled: how many characters of each completion's text no stop string can take back.
    """

    job: RequestGroup
    loop: asyncio.AbstractEventLoop
    streaming: bool
    latest: deque[RequestOutput | BaseException] = field(default_factory=lambda: deque(maxlen=1))
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    notified: bool = False
    settled: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def request_id(self) -> str:
        assert self.job.request_id is not None
        return self.job.request_id

    async def take(self) -> RequestOutput | BaseException:
        while not self.latest:
            if asyncio.get_running_loop() is not self.loop:  # where nothing will wake
                raise RuntimeError(
                    "this stream belongs to another event loop: take its outputs in the one that added it"
                )
            self.arrived.clear()
            await self.arrived.wait()
        return self.latest.popleft()

    def settle(self, output: RequestOutput) -> RequestOutput:
        """Without the text that may become a stop string; in the thread, once for each new output."""
        for index, request in enumerate(self.job.requests):
            if request.detokenizer is not None:
                self.settled[index] += len(
                    request.detokenizer.take(final=request.finish_reason is not None)
                )
        texts = [done.text[: self.settled.get(done.index)] for done in output.outputs]
        if texts == [done.text for done in output.outputs]:
            return output
        return replace(
            output,
            outputs=[
                replace(done, text=text) for done, text in zip(output.outputs, texts, strict=True)
            ],
        )

    @staticmethod
    def wake(channels: "list[Channel]") -> None:
        """In the loop."""
        for channel in channels:
            channel.notified = False
            channel.arrived.set()


class EngineThread:
    """Makes a CompiledLLM, and alternates between steps and commands: functions that others want it to run.

    Graph trees are thread-local, so nothing of the engine may run elsewhere.
    """

    def __init__(self, make: Callable[[], CompiledLLM]) -> None:
        self._process = os.getpid()
        self._commands: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        self._llm: CompiledLLM | None = None
        self._cause: BaseException | None = None
        self._closing = False
        self._channels: dict[str, Channel] = {}
        self._owners: dict[Request, Channel] = {}
        started: Future[None] = Future()
        self._thread = Thread(
            target=self._live, args=(make, started), name="compiled-llm-engine", daemon=True
        )
        self._thread.start()
        try:
            started.result()
        except (
            BaseException
        ):  # after an interrupt the thread goes on starting, and shall end when it has
            self._commands.put((self._stop, Future()))
            raise

    @property
    def llm(self) -> CompiledLLM:
        """What the thread runs; a RuntimeError when it has ended, or is another process's."""
        self._check_process()
        llm = self._llm
        if llm is None:
            raise self._ended()
        return llm

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that has the thread."""
        return os.getpid() != self._process

    def submit(self, command: Callable[[], T]) -> Future[T]:
        """Have a function run before the next step."""
        self._check_process()
        future: Future[T] = Future()
        self._commands.put((command, future))
        if self._llm is None:  # the thread looks no more, or has just looked for the last time
            self._refuse()
        return future

    def abort_soon(self, channel: Channel) -> None:
        """Also from finalizers, which may interrupt anything: SimpleQueue.put is reentrant."""
        if self._llm is not None and not self.forked:
            self._commands.put((partial(self._abort, channel), Future()))

    def close(self) -> None:
        """Abort what runs, and wait for the end; in a forked process there is nothing to end."""
        if self.forked:
            return
        self.submit(self._stop)
        self._thread.join()

    def enter(self, channel: Channel) -> None:
        """A command: let the engine have a checked job's requests, all or none; raises ValueError and QueueFullError."""
        engine, requests = self.llm.engine, channel.job.requests
        engine.check_room(len(requests))
        if channel.request_id in self._channels:
            raise ValueError(
                f"request_id {channel.request_id!r} is that of a running request: expected another, or None"
            )
        try:
            for request in requests:
                engine.add(request)
        except BaseException:
            for request in requests:
                engine.abort(request)
            raise
        self._channels[channel.request_id] = channel
        self._owners.update(dict.fromkeys(requests, channel))

    def abort_named(self, request_id: str) -> None:
        """A command."""
        if request_id in self._channels:
            self._abort(self._channels[request_id])

    def _live(self, make: Callable[[], CompiledLLM], started: Future[None]) -> None:
        try:
            llm = self._llm = make()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        del make, started
        try:
            self._work(llm)
        except BaseException as error:
            traceback.clear_frames(
                error.__traceback__
            )  # their variables would keep caches and graphs
            self._cause, self._llm = (
                error,
                None,
            )  # whoever is told, and asks for more, shall be refused for this cause
            self._deliver(dict.fromkeys(self._channels.values(), _ordinary(error)))
        finally:
            self._llm = None
            self._refuse()
            llm.close()
            del llm

    def _work(self, llm: CompiledLLM) -> None:
        while not self._closing:
            self._obey(wait=not (llm.engine.has_work or llm.model_runner.capture_pending))
            if llm.engine.has_work and not self._closing:
                self._step(llm.engine)
            elif llm.model_runner.capture_pending and not self._closing:
                llm.model_runner.capture_next()
        for channel in list(self._channels.values()):
            self._abort(channel)

    def _step(self, engine: Engine) -> None:
        """Run one step. If it fails, the requests that ran end with the next one; only a broken engine ends the thread."""
        try:
            news = engine.step()
        except EngineBrokenError:
            raise
        except BaseException as error:
            warnings.warn(
                f"a step failed, and the requests that ran in it: {type(error).__name__}: {error}",
                stacklevel=2,
            )
            return
        self._tell(news)

    def _obey(self, *, wait: bool) -> None:
        """Run the commands that have come, or wait for one."""
        while wait or not self._commands.empty():
            command, future = self._commands.get()
            wait = False
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(command())
                except BaseException as error:
                    future.set_exception(_ordinary(error))

    def _stop(self) -> None:
        self._closing = True

    def _abort(self, channel: Channel) -> None:
        if self._channels.get(channel.request_id) is channel:
            for request in channel.job.requests:
                self.llm.engine.abort(request)
            self._deliver({channel: self._output(channel)})

    def _tell(self, news: list[Request]) -> None:
        """Hand out what a step brought."""
        channels = dict.fromkeys(
            self._owners[request] for request in news if request in self._owners
        )
        ready = [channel for channel in channels if channel.streaming or channel.job.finished]
        self._deliver({channel: self._output(channel) for channel in ready})

    def _output(self, channel: Channel) -> RequestOutput | Exception:
        """What has come for the channel; whatever is raised in making it ends its requests alone."""
        try:
            return channel.settle(self.llm.jobs.output(channel.job))
        except BaseException as error:
            for request in channel.job.requests:
                self.llm.engine.abort(request)
            return _ordinary(error)

    def _deliver(self, items: dict[Channel, Any]) -> None:
        """Fill channels with outputs or errors; one call for each event loop wakes those who wait there."""
        wakes: defaultdict[asyncio.AbstractEventLoop, list[Channel]] = defaultdict(list)
        for channel, item in items.items():
            channel.latest.append(item)
            if isinstance(item, BaseException) or item.finished:
                self._forget(channel)
            if not channel.notified or channel.loop.is_closed():
                channel.notified = True
                wakes[channel.loop].append(channel)
        for loop, channels in wakes.items():
            try:
                loop.call_soon_threadsafe(Channel.wake, channels)
            except Exception:  # the loop is closed, as a rule: nobody can wait there
                for channel in channels:
                    self._abort(channel)

    def _forget(self, channel: Channel) -> None:
        del self._channels[channel.request_id]
        for request in channel.job.requests:
            del self._owners[request]

    def _check_process(self) -> None:
        if self.forked:
            raise RuntimeError(
                f"this AsyncCompiledLLM belongs to process {self._process}, and its thread is not in this fork of it: "
                "make a new one here, or start the process by spawning"
            )

    def _refuse(self) -> None:
        """Nobody runs these commands any more."""
        with suppress(Empty):
            while True:
                _, future = self._commands.get_nowait()
                if future.set_running_or_notify_cancel():
                    future.set_exception(self._ended())

    def _ended(self) -> RuntimeError:
        if self._cause is None:
            return RuntimeError("this AsyncCompiledLLM is closed: make a new one")
        error = RuntimeError(
            f"this AsyncCompiledLLM has failed, {type(self._cause).__name__}: {self._cause}: make a new one"
        )
        error.__cause__ = self._cause
        return error


def _ordinary(error: BaseException) -> Exception:
    """Return the error, or a RuntimeError for one that would end an event loop or that asyncio takes for something else."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration | CancelledError):
        return error
    wrapped = RuntimeError(f"{type(error).__name__} was raised in the engine's thread: {error}")
    wrapped.__cause__ = error
    return wrapped
