"""Run a command of a Typer app and return its exit status; a user's error is one line on standard error, without a traceback.

0: done. 1: something differs or failed. 2: bad input. 130: interrupted. 141: the reader of the output has gone, as after `| head`.
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
READER_GONE = 141


def run_command(app: typer.Typer, arguments: Sequence[str], *, prog_name: str) -> int:
    """Run a command and return its exit status; raises what is neither a user's error nor an interrupt."""
    try:
        invoke(app, arguments, prog_name=prog_name)
        sys.stdout.flush()
        status = 0
    except typer.Exit as error:
        status = error.exit_code
    except KeyboardInterrupt:
        status = INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            status = READER_GONE
        elif (refused := _refused(error)) is not None:
            status = refused
            _print_error(error)
        else:
            raise
    _flush_or_discard()
    return status


def invoke(app: typer.Typer, arguments: Sequence[str], *, prog_name: str) -> None:
    """Run a command; raises whatever it raises, and typer.Exit."""
    command = get_command(app)
    with command.make_context(prog_name, list(arguments)) as context:
        command.invoke(context)


def _refused(error: Exception) -> int | None:
    """The exit status of an error that the user can mend; None for a defect of ours, which gets a traceback."""
    if hasattr(
        error, "format_message"
    ):  # a usage error of click, or of the copy of it inside Typer
        return int(getattr(error, "exit_code", BAD_INPUT))
    if isinstance(error, ValueError | OSError | ImportError | MemoryError):
        return BAD_INPUT
    if "torch" not in sys.modules:
        return None
    from torch import OutOfMemoryError

    if isinstance(error, RequestFailedError):
        return 1
    return BAD_INPUT if isinstance(error, OutOfMemoryError | QueueFullError | StrictError) else None


def _print_error(error: Exception) -> None:
    """Print one line; nothing for a missing command, in whose place Typer has printed the help."""
    if hasattr(error, "format_message"):
        text = error.format_message()
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    if text.strip():
        with suppress(OSError):
            print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)


def _reader_is_gone() -> bool:
    """Whether standard output or standard error is a pipe that nobody reads any more."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _flush_or_discard() -> None:
    """Discard output that cannot be written, so that the interpreter does not fail to write it again when it exits."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
