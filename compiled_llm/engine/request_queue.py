"""Priority queue of the requests that wait for a row of the batch."""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator

from compiled_llm.engine.request import Request


class RequestQueue:
    """Waiting requests, lower priority numbers first, equal ones in the order of arrival.

    Every operation except iteration takes the same time in a queue of any length; a new priority
    is inserted into a sorted list.
    """

    def __init__(self) -> None:
        # No level is empty.
        self._levels: dict[int, OrderedDict[Request, None]] = {}
        self._priorities: list[int] = []
        # Requests that were never scheduled, in the order of arrival.
        self._new: OrderedDict[Request, None] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        for priority in self._priorities:
            yield from self._levels[priority]

    @property
    def first(self) -> Request | None:
        """The request that is scheduled next, or None if the queue is empty."""
        return next(iter(self), None)

    @property
    def new(self) -> Iterator[Request]:
        """Requests that were never scheduled, in the order of arrival."""
        return iter(self._new)

    def add(self, request: Request) -> None:
        """Add a request behind all others of its priority."""
        level = self._levels.get(request.priority)
        if level is None:
            level = self._levels[request.priority] = OrderedDict()
            insort(self._priorities, request.priority)
        level[request] = None
        if request.timings.scheduled is None:
            self._new[request] = None
        self._length += 1

    def put_back(self, request: Request) -> None:
        """Add a preempted request before all others of its priority, which arrived later."""
        self.add(request)
        self._levels[request.priority].move_to_end(request, last=False)

    def remove(self, request: Request) -> bool:
        """Remove a request; return False if it is not in the queue."""
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
