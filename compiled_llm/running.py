"""Jobs, run on an engine to their ends by whoever reads how they get on."""

from collections.abc import Generator, Iterable

from compiled_llm.engine.engine import Engine
from compiled_llm.engine.processor import RequestGroup
from compiled_llm.engine.request import Request


def run(
    engine: Engine, jobs: Iterable[RequestGroup], *, at_once: int | None = None
) -> Generator[Request, None, None]:
    """Run jobs to their ends; yields their requests as they get on, and each of them once when it has ended.

    Another iterator's steps serve these requests too, and may end them. Closing the iterator, or an error, ends them all. A caller
    must close it: an exception's traceback would keep it, and its requests, alive.

    Args:
        engine: where they run.
        jobs: read as there is room.
        at_once: the most of their requests in the engine, running or waiting.
    """
    running = set[Request]()
    requests = (request for job in jobs for request in job.requests)
    upcoming = next(requests, None)
    try:
        while running or upcoming is not None:
            while (
                upcoming is not None
                and engine.has_room
                and (at_once is None or len(running) < at_once)
            ):
                running.add(
                    upcoming
                )  # first, so that an interrupt while it is added leaves it to be aborted
                engine.add(upcoming)
                upcoming = next(requests, None)
            news = engine.step()
            ended = [request for request in running if request.finish_reason is not None]
            for request in dict.fromkeys([*news, *ended]):
                if request in running:
                    if request.finish_reason is not None:
                        running.discard(request)
                    yield request
    finally:
        for request in running:
            engine.abort(request)
