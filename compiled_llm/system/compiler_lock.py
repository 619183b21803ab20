"""Locks around the state of torch and transformers that belongs to the process, for engines in several threads.

`COMPILER_LOCK` is held while an engine loads a model, examines, traces, compiles, captures or verifies it. It covers
the settings and patches of Dynamo, Inductor and Triton, the patches of the GGUF reader, torch's default dtype and
random generator while a model is built, the levels of loggers, and torch's counters of compilations. A launch that
may compile again (`compile.dispatch: torch`) holds it too. Replays, and compiled steps without guards, depend on
none of this and take no lock.

An eager step runs the model's Python code. That depends on torch's default dtype, on `torch.compiler.is_compiling()`,
which is true during an export, and on the config and hooks of the model, which another engine may share. Whatever
changes these does so inside `eager_steps_excluded`, which covers building a model and examining it, but not reading
weights or compiling. Without such a change, a step pays less than a microsecond.

Where both are taken, `COMPILER_LOCK` comes first. Both are reentrant, and Ctrl-C ends the wait for either.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar
from weakref import WeakSet

T = TypeVar("T")

COMPILER_LOCK = threading.RLock()
_SOON = 0.02  # seconds

# Held for a change that excludes eager steps. A step passes through it before it begins, so that steps cannot starve a change.
_change = threading.RLock()
_step_locks: WeakSet[object] = WeakSet()


class _OfThread(threading.local):
    """The lock that a thread holds during its eager steps."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        _step_locks.add(self.lock)


_thread = _OfThread()


def compiler_is_free() -> bool:
    """Whether no other thread holds `COMPILER_LOCK` now."""
    free = COMPILER_LOCK.acquire(blocking=False)
    if free:
        COMPILER_LOCK.release()
    return free


@contextmanager
def try_compiler_lock() -> Iterator[bool]:
    """Hold `COMPILER_LOCK`, or yield False where another thread does not give it back at once."""
    free = False
    try:
        free = COMPILER_LOCK.acquire(timeout=_SOON)
        yield free
    finally:
        if free:
            COMPILER_LOCK.release()


def run_eagerly(step: Callable[[], T]) -> T:
    """Return what an eager step returns, after waiting for the end of what excludes it."""
    with _change:  # also for a thread's first step, whose lock a change would otherwise miss
        lock = _thread.lock
    with lock:
        return step()


@contextmanager
def eager_steps_excluded() -> Iterator[None]:
    """Wait for the eager steps of all threads to end, and let none begin while this is open."""
    with ExitStack() as held:
        held.enter_context(_change)
        for lock in list(_step_locks):
            held.enter_context(lock)  # type: ignore[arg-type]
        yield
