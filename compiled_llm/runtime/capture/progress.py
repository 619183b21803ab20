"""The progress bar of building buckets, with a line for each bucket."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from compiled_llm.runtime.capture.captured_bucket import CapturedBucket
from compiled_llm.system.device_memory import free_bytes

ShowBucket = Callable[[CapturedBucket], None]


@contextmanager
def bucket_progress(total: int, device: torch.device, *, enabled: bool) -> Iterator[ShowBucket]:
    """Show a progress bar on standard error; call the function once for each finished bucket."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True, quiet=not enabled)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("compiling buckets", total=total)

        def show(bucket: CapturedBucket) -> None:
            report = bucket.report
            outcome = report.failure or (
                f"compiled in {report.compile_seconds:.1f} s, "
                f"captured in {report.capture_seconds:.1f} s"
            )
            free = free_bytes(device) / 2**30
            bar.console.print(f"{bucket.bucket}: {outcome}, {free:.1f} GiB free", highlight=False)
            bar.advance(task)

        yield show
