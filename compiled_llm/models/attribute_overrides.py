"""Temporary changes to attributes of objects that several engines share, such as a model's config.

The first holder of an attribute records its value, and the last one to release it restores that
value, independent of the order of releases. An attribute that someone else has set in between keeps
its new value.

The garbage collector may release a holder at any time, in any thread, even while another holder is
created. A release therefore only appends to a queue, which the holder of the lock processes.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from torch import Tensor, nn

_ABSENT = object()


@dataclass(slots=True, eq=False)
class _Override:
    """One attribute.

    Attributes:
        owner: the object that has it; the reference keeps the object's id from being reused.
        name: the attribute's name.
        before: its value when the first holder came.
        ours: the values that holders have set.
        holders: the holders that have not released it.
    """

    owner: Any
    name: str
    before: Any
    ours: list[Any] = field(default_factory=list)
    holders: set["AttributeOverrides"] = field(default_factory=set)

    @property
    def value(self) -> Any:
        return getattr(self.owner, self.name, _ABSENT)

    def is_ours(self) -> bool:
        """Return whether the current value is one that a holder has set."""
        value = self.value
        return any(_same(value, ours) for ours in self.ours)

    def restore(self) -> None:
        if not self.is_ours():
            return
        # A registered submodule has to be deleted before its name can hold anything else.
        if self.before is _ABSENT or isinstance(self.value, nn.Module):
            delattr(self.owner, self.name)
        if self.before is not _ABSENT:
            setattr(self.owner, self.name, self.before)


class AttributeOverrides:
    """Hold attributes in order to change them until `release`.

    Args:
        attributes: pairs of an object and an attribute's name. The attribute may be absent; then it
            is deleted at the end.
    """

    def __init__(self, attributes: Iterable[tuple[Any, str]]) -> None:
        self._keys: list[tuple[int, str]] = []
        try:
            with _LOCK:
                for owner, name in attributes:
                    key = (id(owner), name)
                    self._keys.append(key)
                    if key not in _OVERRIDES:
                        _OVERRIDES[key] = _Override(owner, name, getattr(owner, name, _ABSENT))
                    _OVERRIDES[key].holders.add(self)
        except BaseException:
            self.release()
            raise
        _process_releases()

    def record(self) -> None:
        """Record the attributes' current values as set by this holder; call it after the changes.

        At the end an attribute is restored only if it has such a value.
        """
        with _LOCK:
            for key in self._keys:
                override = _OVERRIDES[key]
                if not override.is_ours():
                    override.ours.append(override.value)
        _process_releases()

    def release(self) -> None:
        """Restore the attributes that have no other holder. A second call has no effect."""
        _RELEASED.append(self)
        _process_releases()

    def drop(self) -> None:
        """Do the work of `release`; the caller holds the lock."""
        while self._keys:
            key = self._keys.pop()
            override = _OVERRIDES.get(key)
            if override is None:  # the constructor was interrupted before it recorded this one
                continue
            override.holders.discard(self)
            if not override.holders:
                del _OVERRIDES[key]
                override.restore()


_LOCK = Lock()
_OVERRIDES: dict[tuple[int, str], _Override] = {}
_RELEASED: deque[AttributeOverrides] = deque()


def _same(one: Any, other: Any) -> bool:
    """Compare tensors and modules by identity, other values by equality."""
    if isinstance(one, Tensor | nn.Module) or isinstance(other, Tensor | nn.Module):
        return one is other
    return one is other or bool(one == other)


def _process_releases() -> None:
    """Process the queue, unless the lock is held; whoever holds it processes the queue later."""
    while _RELEASED and _LOCK.acquire(blocking=False):
        try:
            while _RELEASED:
                _RELEASED[0].drop()
                _RELEASED.popleft()
        finally:
            _LOCK.release()
