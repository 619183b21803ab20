"""What a user sees while requests run: a progress bar, or the tokens in a transformers streamer."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.generation.streamers import BaseStreamer

from compiled_llm.engine.request import Request


def feeder(streamer: BaseStreamer | None) -> Callable[[Request], None]:
    """Hands a streamer what transformers would: the prompt, each token, and the end."""
    begun, given = False, 0

    def feed(request: Request) -> None:
        nonlocal begun, given
        if streamer is None:
            return
        if not begun:
            streamer.put(torch.tensor([list(request.prompt_token_ids)]))
        for token in request.token_ids[given:]:
            streamer.put(torch.tensor([token]))
        begun, given = True, len(request.token_ids)
        if request.finish_reason is not None:
            streamer.end()

    return feed


@contextmanager
def progress_bar(total: int, *, enabled: bool) -> Iterator[Callable[[Request], None]]:
    """Shows requests that have ended, and the tokens per second that they generated."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[speed]}"),
    )
    with Progress(
        *columns, console=console, disable=not (enabled and console.is_terminal), transient=True
    ) as bar:
        task, began, tokens = (
            bar.add_task("generating", total=total, speed=""),
            time.perf_counter(),
            0,
        )

        def show(request: Request) -> None:
            nonlocal tokens
            if request.finish_reason is not None:
                tokens += len(request.token_ids)
                bar.update(
                    task, advance=1, speed=f"{tokens / (time.perf_counter() - began):.0f} tokens/s"
                )

        yield show
