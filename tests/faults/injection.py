"""Exceptions raised at chosen points: before any line, or in any call of a function."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import compiled_llm

_ROOT = str(Path(compiled_llm.__file__).parent)


class LineCounter:
    """Trace function that counts executed lines of the package, and raises at one of them.

    Args:
        at: the line, counted from 0, before which to raise; None to count only.
        error: the exception; the interpreter may raise KeyboardInterrupt at any instruction.
    """

    def __init__(self, at: int | None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self._at, self._error = at, error
        self.count = 0
        self.where = ""
        self._ours: dict[CodeType, bool] = {}

    def __enter__(self) -> "LineCounter":
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        if code not in self._ours:
            self._ours[code] = code.co_filename.startswith(_ROOT)
        return self._line if self._ours[code] else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            if self.count == self._at:
                self._at = None
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise self._error("injected")
            self.count += 1
        return self._line


@contextmanager
def failing_call(
    owner: Any, name: str, number: int, error: type[BaseException], *, after: bool = False
) -> Iterator[list[int]]:
    """Raise in the n-th call of an attribute, counted from 0, before or after it runs.

    Yields a list whose item is the number of calls.
    """
    original: Callable[..., Any] = getattr(owner, name)
    calls = [0]

    def replacement(*args: Any, **kwargs: Any) -> Any:
        mine = calls[0]
        calls[0] += 1
        if mine == number and not after:
            raise error("injected")
        result = original(*args, **kwargs)
        if mine == number and after:
            raise error("injected")
        return result

    with mock.patch.object(owner, name, replacement):
        yield calls
