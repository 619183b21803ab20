"""Locks around the process-wide state of torch and transformers, for engines in several threads.

`COMPILER_LOCK` is held while an engine loads a model, examines, traces, compiles, captures or
verifies it. It covers the settings and patches of Dynamo, Inductor and Triton, the patches of the
GGUF reader, torch's default dtype and random generator while a model is built, the levels of
loggers, and torch's counters of compilations. A launch that may compile again
(`compile.dispatch: torch`) holds it too. Replays and compiled steps without guards use none of this
state and take no lock.

An eager step runs the model's Python code. It depends on torch's default dtype, on
`torch.compiler.is_compiling()`, which is true during an export, and on the config and hooks of the
model, which another engine may share. Changes to these are made inside `eager_steps_excluded`,
which covers building a model and examining it, but not reading weights or compiling. The cost for a
step without such a change is below a microsecond.

A thread that takes both takes `COMPILER_LOCK` first. Both are reentrant, and Ctrl-C ends the wait
for either.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar
from weakref import WeakSet

T = TypeVar("T")

COMPILER_LOCK = threading.RLock()
_SHORT_WAIT = 0.02  # seconds

# Held during a change that excludes eager steps. A step acquires it briefly before it begins, so
# that a sequence of steps cannot starve a change.
_change = threading.RLock()
_step_locks: WeakSet[object] = WeakSet()


class _StepLock(threading.local):
    """The lock that a thread holds during its eager steps."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        _step_locks.add(self.lock)


_thread = _StepLock()


def compiler_is_free() -> bool:
    """Return whether no other thread holds `COMPILER_LOCK`."""
    free = COMPILER_LOCK.acquire(blocking=False)
    if free:
        COMPILER_LOCK.release()
    return free


@contextmanager
def try_compiler_lock() -> Iterator[bool]:
    """Hold `COMPILER_LOCK`, or yield False if another thread does not release it at once."""
    free = False
    try:
        free = COMPILER_LOCK.acquire(timeout=_SHORT_WAIT)
        yield free
    finally:
        if free:
            COMPILER_LOCK.release()


def run_eagerly(step: Callable[[], T]) -> T:
    """Run an eager step and return its result; waits for a change that excludes eager steps."""
    # A thread's first step creates its lock here, where no change can miss it.
    with _change:
        lock = _thread.lock
    with lock:
        return step()


@contextmanager
def eager_steps_excluded() -> Iterator[None]:
    """Wait for the eager steps of all threads to end; none begins while the body runs."""
    with ExitStack() as held:
        held.enter_context(_change)
        for lock in list(_step_locks):
            held.enter_context(lock)  # type: ignore[arg-type]
        yield
