"""Synchronous loop that runs requests to completion, driven by the consumer of an iterator."""

from collections.abc import Generator, Iterable

from compiled_llm.engine.engine import Engine
from compiled_llm.engine.output_builder import RequestGroup
from compiled_llm.engine.output_processor import merge_requests
from compiled_llm.engine.request import Request


def run_to_completion(
    engine: Engine, groups: Iterable[RequestGroup], *, max_requests: int | None = None
) -> Generator[Request, None, None]:
    """Run requests, and yield each when it is updated and once when it has ended.

    Steps of other iterators serve these requests too, and may end them. Closing the iterator, or an
    error, aborts the unfinished ones. The caller must close it, because the traceback of an
    exception would keep it, and so its requests, alive.

    Args:
        engine: the engine.
        groups: groups of validated requests, read as the queue has room.
        max_requests: maximum number of these requests in the engine at a time.
    """
    unfinished = set[Request]()
    requests = (request for group in groups for request in group.requests)
    upcoming = next(requests, None)
    try:
        while unfinished or upcoming is not None:
            while (
                upcoming is not None
                and engine.can_queue
                and (max_requests is None or len(unfinished) < max_requests)
            ):
                # Recorded first, so that an interrupt in `add_request` does not leave it running.
                unfinished.add(upcoming)
                engine.add_request(upcoming)
                upcoming = next(requests, None)
            updated = engine.step()
            ended = [request for request in unfinished if request.finish_reason is not None]
            for request in merge_requests(updated, ended):
                if request in unfinished:
                    if request.finish_reason is not None:
                        unfinished.discard(request)
                    yield request
    finally:
        for request in unfinished:
            engine.abort(request)
