"""Functions that other threads submit for execution in the engine's thread."""

from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class CommandQueue:
    """Commands in the order of their submission.

    `submit` may be called from finalizers, which may interrupt anything, because `SimpleQueue.put`
    is reentrant.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()

    def submit(self, command: Callable[[], T]) -> Future[T]:
        """Add a command, and return the future of its result."""
        future: Future[T] = Future()
        self._queue.put((command, future))
        return future

    def run(self, *, wait: bool) -> None:
        """Run the commands that have been submitted.

        Args:
            wait: whether to wait for a command if there is none.
        """
        while wait or not self._queue.empty():
            command, future = self._queue.get()
            wait = False
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(command())
                except BaseException as error:
                    future.set_exception(to_exception(error))

    def reject(self, make_error: Callable[[], Exception]) -> None:
        """Fail all commands with an error."""
        with suppress(Empty):
            while True:
                _, future = self._queue.get_nowait()
                if future.set_running_or_notify_cancel():
                    future.set_exception(make_error())


def to_exception(error: BaseException) -> Exception:
    """Return an exception that a consumer in an event loop can be given.

    Exceptions that would end the loop, or that asyncio gives another meaning, are wrapped in a
    RuntimeError.
    """
    if isinstance(error, Exception) and not isinstance(error, StopIteration | CancelledError):
        return error
    wrapped = RuntimeError(f"{type(error).__name__} was raised in the engine's thread: {error}")
    wrapped.__cause__ = error
    return wrapped
