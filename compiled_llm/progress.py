"""Progress of running requests: a progress bar, and tokens for a transformers streamer."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.generation.streamers import BaseStreamer

from compiled_llm.engine.request import Request


def streamer_callback(streamer: BaseStreamer) -> Callable[[Request], None]:
    """Return a callback that passes a request's prompt, each token and the end to a streamer."""
    begun, num_given = False, 0

    def update(request: Request) -> None:
        nonlocal begun, num_given
        if not begun:
            streamer.put(torch.tensor([list(request.prompt_token_ids)]))
        for token in request.token_ids[num_given:]:
            streamer.put(torch.tensor([token]))
        begun, num_given = True, len(request.token_ids)
        if request.finish_reason is not None:
            streamer.end()

    return update


@contextmanager
def progress_bar(total: int, *, enabled: bool) -> Iterator[Callable[[Request], None]]:
    """Show the number of finished requests, and their tokens per second, on standard error.

    Args:
        total: number of requests.
        enabled: whether to show it, if standard error is a terminal.

    Returns:
        A context manager whose value is a callback for each updated request.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[speed]}"),
    )
    shown = enabled and console.is_terminal
    with Progress(*columns, console=console, disable=not shown, transient=True) as bar:
        task = bar.add_task("generating", total=total, speed="")
        began, num_tokens = time.perf_counter(), 0

        def update(request: Request) -> None:
            nonlocal num_tokens
            if request.finish_reason is not None:
                num_tokens += len(request.token_ids)
                speed = num_tokens / (time.perf_counter() - began)
                bar.update(task, advance=1, speed=f"{speed:.0f} tokens/s")

        yield update
