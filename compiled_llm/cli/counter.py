"""Count completed prompts on standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def counter(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` are done: a bar on a terminal, else a line every ten seconds.

    Yields:
        A function to call for each one, with the number of tokens generated so far.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    began = printed = time.perf_counter()
    done = 0
    with bar:
        task = bar.add_task(name, total=total, speed="")

        def count(num_tokens: int) -> None:
            nonlocal done, printed
            done, now = done + 1, time.perf_counter()
            speed = f"{num_tokens / (now - began):.0f} tokens/s" if num_tokens else ""
            bar.update(task, advance=1, speed=speed)
            if not console.is_terminal and now - printed > _SECONDS_BETWEEN_LINES:
                printed = now
                line = ", ".join(filter(None, (f"{name}: {done} of {total}", speed)))
                print(line, file=sys.stderr, flush=True)

        yield count
