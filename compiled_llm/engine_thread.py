"""The thread that owns an engine, and runs steps and commands in turn.

CUDA graph trees are thread-local, so no part of the engine may run in another thread.
"""

import asyncio
import logging
import os
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from threading import Thread
from typing import TypeVar

from compiled_llm.engine.channel import Channel, wake
from compiled_llm.engine.command_queue import CommandQueue, to_exception
from compiled_llm.engine.engine import Engine
from compiled_llm.engine.request import Request
from compiled_llm.errors import EngineBrokenError
from compiled_llm.llm import CompiledLLM
from compiled_llm.outputs import RequestOutput

T = TypeVar("T")
logger = logging.getLogger(__name__)


class EngineThread:
    """Makes a CompiledLLM in a new thread, which then alternates between steps and commands.

    Args:
        make: makes the CompiledLLM; the constructor waits for it, and raises its exceptions.
    """

    def __init__(self, make: Callable[[], CompiledLLM]) -> None:
        self._process = os.getpid()
        self._commands = CommandQueue()
        self._llm: CompiledLLM | None = None
        self._cause: BaseException | None = None  # of the end of the thread
        self._closing = False
        self._channels: dict[str, Channel] = {}
        self._channel_of: dict[Request, Channel] = {}
        started: Future[None] = Future()
        self._thread = Thread(
            target=self._main, args=(make, started), name="compiled-llm-engine", daemon=True
        )
        self._thread.start()
        try:
            started.result()
        except BaseException:
            # After an interrupt the thread continues to start; it ends when it has started.
            self._commands.submit(self._stop)
            raise

    @property
    def llm(self) -> CompiledLLM:
        """The CompiledLLM; raises RuntimeError if the thread has ended, or in a forked process."""
        self._check_process()
        if (llm := self._llm) is None:
            raise self._ended_error()
        return llm

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that runs the thread."""
        return os.getpid() != self._process

    def submit(self, command: Callable[[], T]) -> Future[T]:
        """Run a command in the thread before the next step, and return the future of its result."""
        self._check_process()
        future = self._commands.submit(command)
        if self._llm is None:  # the thread may have rejected its last commands
            self._commands.reject(self._ended_error)
        return future

    def abort_soon(self, channel: Channel) -> None:
        """Abort the requests of a channel before the next step; may be called from finalizers."""
        if self._llm is not None and not self.forked:
            self._commands.submit(partial(self._abort, channel))

    def close(self) -> None:
        """Abort all requests, and wait until the thread has ended. No effect in a fork."""
        if not self.forked:
            self.submit(self._stop)
            self._thread.join()

    def add_requests(self, channel: Channel) -> None:
        """Add all validated requests of a channel to the engine, or none. A command.

        Raises:
            ValueError: a running request has the same name.
            QueueFullError: the queue is full.
        """
        engine, requests = self.llm.engine, channel.group.requests
        engine.check_queue(len(requests))
        if channel.request_id in self._channels:
            raise ValueError(
                f"request_id {channel.request_id!r} is that of a running request: "
                "expected another, or None"
            )
        try:
            for request in requests:
                engine.add_request(request)
        except BaseException:
            for request in requests:
                engine.abort(request)
            raise
        self._channels[channel.request_id] = channel
        self._channel_of.update(dict.fromkeys(requests, channel))

    def abort_by_id(self, request_id: str) -> None:
        """Abort the requests of this name, if there are any. A command."""
        if request_id in self._channels:
            self._abort(self._channels[request_id])

    def _main(self, make: Callable[[], CompiledLLM], started: Future[None]) -> None:
        try:
            llm = self._llm = make()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        del make, started
        try:
            self._run(llm)
        except BaseException as error:
            logger.error("The engine's thread ended: %s: %s", type(error).__name__, error)
            # Local variables of the frames would keep caches and graphs alive.
            traceback.clear_frames(error.__traceback__)
            # Set before the delivery, so that a consumer's next call is refused with this cause.
            self._cause = error
            self._llm = None
            self._deliver(dict.fromkeys(self._channels.values(), to_exception(error)))
        finally:
            self._llm = None
            self._commands.reject(self._ended_error)
            llm.close()
            del llm

    def _run(self, llm: CompiledLLM) -> None:
        while not self._closing:
            is_idle = not (llm.engine.has_work or llm.model_runner.capture_pending)
            self._commands.run(wait=is_idle)
            if llm.engine.has_work and not self._closing:
                self._step(llm.engine)
            elif llm.model_runner.capture_pending and not self._closing:
                llm.model_runner.capture_next()
        for channel in list(self._channels.values()):
            self._abort(channel)

    def _step(self, engine: Engine) -> None:
        """Run a step. If it fails, its requests end with the next step; a broken engine raises."""
        try:
            updated = engine.step()
        except EngineBrokenError:
            raise
        except BaseException as error:
            warnings.warn(
                f"a step failed, and its requests with it: {type(error).__name__}: {error}",
                stacklevel=2,
            )
            return
        self._deliver_updates(updated)

    def _stop(self) -> None:
        self._closing = True

    def _abort(self, channel: Channel) -> None:
        if self._channels.get(channel.request_id) is channel:
            for request in channel.group.requests:
                self.llm.engine.abort(request)
            self._deliver({channel: self._output(channel)})

    def _deliver_updates(self, updated: Iterable[Request]) -> None:
        channels = dict.fromkeys(
            self._channel_of[request] for request in updated if request in self._channel_of
        )
        ready = [channel for channel in channels if channel.streaming or channel.group.finished]
        self._deliver({channel: self._output(channel) for channel in ready})

    def _output(self, channel: Channel) -> RequestOutput | Exception:
        """Return the output of a channel; an exception in building it ends its requests only."""
        try:
            return self.llm._runner.outputs.build(channel.group)
        except BaseException as error:
            for request in channel.group.requests:
                self.llm.engine.abort(request)
            return to_exception(error)

    def _deliver(self, items: dict[Channel, RequestOutput | Exception]) -> None:
        """Write items to channels, and wake their consumers with one call for each event loop."""
        to_wake: defaultdict[asyncio.AbstractEventLoop, list[Channel]] = defaultdict(list)
        for channel, item in items.items():
            channel.latest.append(item)
            if isinstance(item, BaseException) or item.finished:
                self._remove(channel)
            if not channel.notified or channel.loop.is_closed():
                channel.notified = True
                to_wake[channel.loop].append(channel)
        for loop, channels in to_wake.items():
            try:
                loop.call_soon_threadsafe(wake, channels)
            except Exception:  # usually because the loop is closed and no consumer can wait there
                for channel in channels:
                    self._abort(channel)

    def _remove(self, channel: Channel) -> None:
        del self._channels[channel.request_id]
        for request in channel.group.requests:
            del self._channel_of[request]

    def _check_process(self) -> None:
        if self.forked:
            raise RuntimeError(
                f"this AsyncCompiledLLM belongs to process {self._process}, and its thread does "
                "not run in this fork of it: make a new one here, or start the process by spawning"
            )

    def _ended_error(self) -> RuntimeError:
        if self._cause is None:
            return RuntimeError("this AsyncCompiledLLM is closed: make a new one")
        error = RuntimeError(
            f"this AsyncCompiledLLM has failed, {type(self._cause).__name__}: {self._cause}: "
            "make a new one"
        )
        error.__cause__ = self._cause
        return error
