"""Run a command of a Typer app and return its exit status.

A user's error is one line on standard error, without a traceback. The statuses are 0 for success, 1
if a comparison or request failed, 2 for bad input, 130 if interrupted, and 141 if the reader of the
output has closed it, as in `| head`.
"""

import os
import select
import sys
from collections.abc import Sequence
from contextlib import suppress

import typer
from typer.main import get_command

from compiled_llm.errors import QueueFullError, RequestFailedError, StrictError

BAD_INPUT = 2
INTERRUPTED = 130
OUTPUT_CLOSED = 141


def run_command(app: typer.Typer, arguments: Sequence[str], *, prog_name: str) -> int:
    """Run a command and return its exit status; raise an error that is a defect of the program."""
    try:
        invoke(app, arguments, prog_name=prog_name)
        sys.stdout.flush()
        status = 0
    except typer.Exit as error:
        status = error.exit_code
    except KeyboardInterrupt:
        status = INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            status = OUTPUT_CLOSED
        else:
            of_error = _status_of(error)
            if of_error is None:
                raise
            status = of_error
            _print_error(error)
    _flush_or_discard()
    return status


def invoke(app: typer.Typer, arguments: Sequence[str], *, prog_name: str) -> None:
    """Run a command; raise what it raises, and `typer.Exit` for another status than 0."""
    command = get_command(app)
    with command.make_context(prog_name, list(arguments)) as context:
        command.invoke(context)


def _status_of(error: Exception) -> int | None:
    """Return the exit status of a user's error; None for a defect of the program."""
    if hasattr(error, "format_message"):  # a usage error of click or of Typer's copy of it
        return int(getattr(error, "exit_code", BAD_INPUT))
    if isinstance(error, RequestFailedError):
        return 1
    refusals = ValueError | OSError | ImportError | MemoryError | QueueFullError | StrictError
    is_refusal = isinstance(error, refusals) or _is_out_of_memory(error)
    return BAD_INPUT if is_refusal else None


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether the GPU has no memory left."""
    if "torch" not in sys.modules:
        return False
    from torch import OutOfMemoryError

    return isinstance(error, OutOfMemoryError)


def _print_error(error: Exception) -> None:
    """Print one line; nothing for a missing command, for which Typer has printed the help."""
    if hasattr(error, "format_message"):
        text = error.format_message()
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    if text.strip():
        with suppress(OSError):
            print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)


def _output_is_closed() -> bool:
    """Return whether standard output or standard error is a pipe whose reader has closed it."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _flush_or_discard() -> None:
    """Discard output that cannot be written; the interpreter would try again at its exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
