"""Recovery of an engine after a call that an exception interrupted.

Any line of a call may raise: an interrupt, an out-of-memory error, a failing callback. Undoing half
of a step is not attempted. Whatever a step may have changed is dropped: rows, block tables, the
prefix cache and the launched steps. Requests that were running end with an error; requests that
were waiting depend on none of this and keep waiting. Recovery itself may be interrupted and is then
run again.
"""

import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, TypeVar

from compiled_llm.engine.model_runner_protocol import ModelRunnerProtocol
from compiled_llm.engine.request import Request
from compiled_llm.engine.scheduler import Scheduler
from compiled_llm.errors import EngineBrokenError

logger = logging.getLogger(__name__)

Method = TypeVar("Method", bound=Callable[..., Any])

# Consecutive recoveries from errors that ended no request, after which the engine is broken.
_MAX_FUTILE = 3
# Code of the methods that change an engine, by which they are found on a thread's stack.
_CHANGING: set[CodeType] = set()


def changes_engine(method: Method) -> Method:
    """Register a method of an engine as one that must not be called from within another."""
    _CHANGING.add(method.__code__)
    return method


class RecoverableEngine(ABC):
    """Base of the engine: marks it inconsistent during calls, and recovers from interrupted ones.

    A call that changes the engine marks it inconsistent until it returns. If an exception ends the
    call early, the mark stays, and the next call recovers first.
    """

    def __init__(self, model_runner: ModelRunnerProtocol) -> None:
        self._model_runner = model_runner
        self._consistent = True
        self._cause = ""  # of the last interrupted call
        self._num_futile = 0
        self._broken: str | None = None

    @property
    def broken(self) -> str | None:
        """Why the engine refuses all calls; None while it works."""
        return self._broken

    def is_called_in(self, frame: FrameType | None) -> bool:
        """Return whether a call that changes the engine is among `frame` and its callers."""
        return count_on_stack(self, _CHANGING, frame) > 0

    @abstractmethod
    def _restart(self, error: str) -> list[Request]:
        """Drop the state that a step changes, and end the running requests with this error.

        Returns:
            The requests that have ended.
        """

    @abstractmethod
    def _unfinished(self) -> list[Request]:
        """Return all requests that run or wait."""

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Mark the engine inconsistent until the block has completed."""
        self._enter()
        self._consistent = False
        try:
            yield
        except BaseException as error:
            self._cause = f"{type(error).__name__}: {error}".removesuffix(": ")
            self._num_futile += isinstance(error, Exception)
            raise
        self._consistent = True

    def _enter(self) -> None:
        """Refuse a call that is not allowed now, and recover from an interrupted one."""
        if self._broken is not None:
            raise self._broken_error(self._broken)
        self._model_runner.check_owner()
        if self._consistent:
            return
        if self._is_nested():
            raise RuntimeError(
                "this engine is in a step and cannot be called from within it: "
                "return from the logits processor first"
            )
        self._recover()

    def _is_nested(self) -> bool:
        """Return whether a logits processor or a finalizer makes this call, within another one."""
        return not self._consistent and count_on_stack(self, _CHANGING, sys._getframe()) > 1

    def _recover(self) -> None:
        cause = self._cause or "an interrupt"
        try:
            self._model_runner.recover()
            ended = self._restart(f"the step in which it ran was interrupted by {cause}")
        except Exception as error:
            why = f"after {cause} it could not recover, {type(error).__name__}: {error}"
            raise self._break(why) from error
        if ended:
            self._num_futile = 0
        if self._num_futile > _MAX_FUTILE:
            raise self._break(f"its steps fail although no request runs, {self._cause}")
        logger.warning("Recovered from %s: %d requests ended with an error", cause, len(ended))
        self._model_runner.report.scheduling.recoveries += 1
        self._cause = ""
        self._consistent = True

    def _break(self, why: str) -> EngineBrokenError:
        """End all requests, refuse further calls, and return the error that says so."""
        self._broken = why
        for request in self._unfinished():
            if request.finish_reason is None:
                request.error = why
                request.finish_reason = "error"
        return self._broken_error(why)

    def _broken_error(self, why: str) -> EngineBrokenError:
        return EngineBrokenError(f"this engine is broken: {why}: make a new one")


def move_unfinished(old: Scheduler, new: Scheduler, error: str) -> list[Request]:
    """End the requests that run in `old`, and add those that wait there to `new`.

    Args:
        old: the scheduler of the interrupted call.
        new: a fresh scheduler; requests are added in the order of their arrival.
        error: error message of the requests that are ended.

    Returns:
        The requests of `old` that have ended.
    """
    for row in old.input_batch.running:
        request = old.input_batch.request(row)
        if request.finish_reason is None:
            request.error = error
            request.finish_reason = "error"
        old.input_batch.remove_request(row)
    ended = []
    for request in old.unfinished:
        if request.finish_reason is not None:
            ended.append(request)
            continue
        if request.prompt_logprobs is not None:  # a preemption was interrupted
            request.prompt_logprobs = []
        new.add_request(request)
    return ended


def count_on_stack(owner: object, codes: Collection[CodeType], frame: FrameType | None) -> int:
    """Count the calls of methods of `owner` with one of these code objects on a stack.

    Args:
        owner: object whose methods are counted.
        codes: code objects of the methods.
        frame: the innermost frame.
    """
    count = 0
    while frame is not None:
        count += frame.f_code in codes and frame.f_locals.get("self") is owner
        frame = frame.f_back
    return count
