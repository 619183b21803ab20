"""Recovery of an engine whose call was cut short by an exception: an interrupt, an out-of-memory error, a failing hook.

Undoing half of a step is not attempted. What a step may have changed is dropped: rows, block tables, the prefix cache and the
launched steps. Requests that were running end with an error; requests that were waiting hold none of it and keep waiting. The
functions may themselves be interrupted and run again.
"""

from collections.abc import Collection
from types import CodeType, FrameType

from compiled_llm.engine.request import Request
from compiled_llm.engine.scheduler import Scheduler


def move_unfinished(old: Scheduler, new: Scheduler, error: str) -> list[Request]:
    """End the requests that run in `old`, and add those that wait there to `new`, in the order of their arrival.

    Args:
        error: the text that ended requests report.

    Returns:
        The requests that have ended and that `old` had not forgotten yet.
    """
    for row in old.rows.running:
        request = old.rows.request(row)
        if request.finish_reason is None:
            request.finish_reason, request.error = "error", error
        old.rows.leave(row)
    ended = []
    for request in old.unfinished:
        if request.finish_reason is not None:
            ended.append(request)
            continue
        if request.prompt_logprobs is not None:  # of a preemption that was cut short
            request.prompt_logprobs = []
        new.add(request)
    return ended


def count_on_stack(owner: object, codes: Collection[CodeType], frame: FrameType | None) -> int:
    """Count the calls of methods of `owner` with one of these code objects in `frame` and its callers."""
    count = 0
    while frame is not None:
        count += frame.f_code in codes and frame.f_locals.get("self") is owner
        frame = frame.f_back
    return count
