"""Attributes that engines change on objects they share, such as a model's config, and that return to what they were.

The first holder of an attribute records its value, and the last one to release it restores that value, in whatever order
they come and go. A value that someone else has set meanwhile is left alone. A garbage collection may release a hold, at any
time, in any thread, and while another hold is being made. So a release only enters a queue, which whoever has the lock empties.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

_ABSENT = object()


@dataclass(slots=True, eq=False)
class _Held:
    """One attribute.

    Attributes:
        owner: the object that has it; kept, so that its id stays its own.
        before: its value when the first holder came.
        ours: the values that holders have set.
        holders: those that have not been released.
    """

    owner: Any
    name: str
    before: Any
    ours: list[Any] = field(default_factory=list)
    holders: set["AttributeOverrides"] = field(default_factory=set)

    def restore(self) -> None:
        if getattr(self.owner, self.name, _ABSENT) not in self.ours:
            return
        if self.before is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)


class AttributeOverrides:
    """One holder's claim on attributes, which it is about to change.

    Args:
        attributes: objects and the names of their attributes.
    """

    def __init__(self, attributes: Iterable[tuple[Any, str]]) -> None:
        self._keys: list[tuple[int, str]] = []
        try:
            with _LOCK:
                for owner, name in attributes:
                    key = (id(owner), name)
                    self._keys.append(key)
                    if key not in _HELD:
                        _HELD[key] = _Held(owner, name, getattr(owner, name, _ABSENT))
                    _HELD[key].holders.add(self)
        except BaseException:
            self.release()
            raise
        _restore_released()

    def note_changes(self) -> None:
        """The attributes now have the values that the holder has set; only from such a value are they restored."""
        with _LOCK:
            for key in self._keys:
                held = _HELD[key]
                value = getattr(held.owner, held.name, _ABSENT)
                if value not in held.ours:
                    held.ours.append(value)
        _restore_released()

    def release(self) -> None:
        """Restore the attributes that have no other holder. A second call does nothing."""
        _RELEASED.append(self)
        _restore_released()

    def drop(self) -> None:
        """With the lock held."""
        while self._keys:
            key = self._keys.pop()
            held = _HELD.get(key)
            if held is None:  # interrupted before it was recorded
                continue
            held.holders.discard(self)
            if not held.holders:
                del _HELD[key]
                held.restore()


_LOCK = Lock()
_HELD: dict[tuple[int, str], _Held] = {}
_RELEASED: deque[AttributeOverrides] = deque()


def _restore_released() -> None:
    """Work off the queue, unless another thread, or this one further up its stack, has the lock and will do so."""
    while _RELEASED and _LOCK.acquire(blocking=False):
        try:
            while _RELEASED:
                _RELEASED[0].drop()
                _RELEASED.popleft()
        finally:
            _LOCK.release()
