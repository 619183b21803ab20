"""The progress bar of building buckets, with a line for each bucket."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from compiled_llm.report.report import BucketState
from compiled_llm.runtime.capture.captured_bucket import CapturedBucket
from compiled_llm.system.device_memory import free_bytes

_log = logging.getLogger(__name__)

ShowBucket = Callable[[CapturedBucket], None]


@contextmanager
def bucket_progress(total: int, device: torch.device, *, enabled: bool) -> Iterator[ShowBucket]:
    """Show a progress bar on standard error; call the function once for each finished bucket.

    Failures are logged, whether the bar is enabled or not.
    """
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
            bar.advance(task)
            report = bucket.report
            if report.state is BucketState.FAILED:
                _log.warning("bucket %s is not used: %s", bucket.bucket, report.failure)
                return
            outcome = report.failure or (
                f"compiled in {report.compile_seconds:.1f} s, "
                f"captured in {report.capture_seconds:.1f} s"
            )
            free = free_bytes(device) / 2**30
            bar.console.print(f"{bucket.bucket}: {outcome}, {free:.1f} GiB free", highlight=False)

        yield show
