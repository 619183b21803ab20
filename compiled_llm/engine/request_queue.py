"""The requests that wait for a row, in the order in which they are to get one."""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator

from compiled_llm.engine.request import Request


class RequestQueue:
    """Waiting requests: those of lower priority numbers first, equals by arrival.

    No operation but iteration takes longer in a longer queue; a new priority is inserted into a sorted list.
    """

    def __init__(self) -> None:
        self._levels: dict[int, OrderedDict[Request, None]] = {}  # none of them empty
        self._priorities: list[int] = []  # sorted
        self._new: OrderedDict[Request, None] = (
            OrderedDict()
        )  # those that never had a row, by arrival
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        for priority in self._priorities:
            yield from self._levels[priority]

    @property
    def first(self) -> Request | None:
        """The request that is to get the next row."""
        return next(iter(self), None)

    @property
    def new(self) -> Iterator[Request]:
        """Requests that never had a row, by arrival."""
        return iter(self._new)

    def add(self, request: Request) -> None:
        """Add a request that has arrived last."""
        level = self._levels.get(request.priority)
        if level is None:
            level = self._levels[request.priority] = OrderedDict()
            insort(self._priorities, request.priority)
        level[request] = None
        if request.timings.scheduled is None:
            self._new[request] = None
        self._length += 1

    def put_back(self, request: Request) -> None:
        """Add a request that had a row, and so arrived before all others of its priority that wait."""
        self.add(request)
        self._levels[request.priority].move_to_end(request, last=False)

    def remove(self, request: Request) -> bool:
        """Remove a request; False when it does not wait."""
        level = self._levels.get(request.priority)
        if level is None or request not in level:
            return False
        del level[request]
        self._new.pop(request, None)
        self._length -= 1
        if not level:
            del self._levels[request.priority]
            del self._priorities[bisect_left(self._priorities, request.priority)]
        return True
