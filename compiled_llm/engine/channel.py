"""Delivery of outputs from the engine's thread to a consumer in an event loop."""

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from compiled_llm.engine.output_builder import RequestGroup
from compiled_llm.outputs import RequestOutput


@dataclass(slots=True, kw_only=True, eq=False)
class Channel:
    """Latest output of a group of requests, or the exception that ended the engine's thread.

    Attributes:
        group: the requests.
        loop: event loop of the consumer.
        streaming: whether outputs are delivered before the requests have ended.
        latest: written by the engine's thread and emptied by the consumer.
        arrived: event of the loop, set after `latest` was written.
        notified: whether a call that sets `arrived` is scheduled in the loop.
    """

    group: RequestGroup
    loop: asyncio.AbstractEventLoop
    streaming: bool
    latest: deque[RequestOutput | BaseException] = field(default_factory=lambda: deque(maxlen=1))
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    notified: bool = False

    @property
    def request_id(self) -> str:
        """Name of the requests."""
        assert self.group.request_id is not None
        return self.group.request_id

    async def take(self) -> RequestOutput | BaseException:
        """Wait for the next item, and remove it.

        Raises:
            RuntimeError: the current event loop is not that of the channel, which is never woken.
        """
        while not self.latest:
            if asyncio.get_running_loop() is not self.loop:
                raise RuntimeError(
                    "this stream belongs to another event loop: take its outputs in the loop "
                    "in which it was added"
                )
            self.arrived.clear()
            await self.arrived.wait()
        return self.latest.popleft()


def wake(channels: Iterable[Channel]) -> None:
    """Wake the consumers of channels; to be called in their event loop."""
    for channel in channels:
        channel.notified = False
        channel.arrived.set()
