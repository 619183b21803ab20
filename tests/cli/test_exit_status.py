"""Tests of the exit status and output of each kind of error."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from compiled_llm.cli.exit_status import run_command
from compiled_llm.errors import QueueFullError, RequestFailedError, StrictError


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (
            PermissionError(13, "Permission denied", "/cache"),
            2,
            "error: /cache: Permission denied\n",
        ),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
        (
            UnicodeDecodeError("utf-8", b"\xe4", 0, 1, "bad"),
            2,
            "error: 'utf-8' codec can't decode byte 0xe4 in position 0: bad\n",
        ),
        (ValueError("of several\n  lines"), 2, "error: of several lines\n"),
        (
            ModuleNotFoundError("No module named 'matplotlib'"),
            2,
            "error: No module named 'matplotlib'\n",
        ),
        (MemoryError(), 2, "error: MemoryError\n"),
        (torch.OutOfMemoryError("out of memory"), 2, "error: out of memory\n"),
        (QueueFullError("the queue is full"), 2, "error: the queue is full\n"),
        (StrictError("a bucket failed"), 2, "error: a bucket failed\n"),
        (RequestFailedError("the request ended"), 1, "error: the request ended\n"),
        (KeyboardInterrupt(), 130, ""),
        (typer.Exit(1), 1, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_the_exit_status_of_each_error(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(_raising(error), [], prog_name="program") == status
    assert capsys.readouterr() == ("", line)


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(KeyError, match="layer"):
        run_command(_raising(KeyError("layer")), [], prog_name="program")


def _raising(error: BaseException) -> typer.Typer:
    """Return a command line with one command, which raises `error`."""
    raising = typer.Typer()

    @raising.command()
    def command() -> None:
        raise error

    return raising


_PRINTS = """
import sys, typer
from compiled_llm.cli.exit_status import run_command
app = typer.Typer()
@app.command()
def command() -> None:
    for _ in range(100_000):
        print("a line")
sys.exit(run_command(app, [], prog_name="program"))
"""


def test_a_closed_pipe_is_no_error() -> None:
    program = [sys.executable, "-c", _PRINTS]
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "a line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", _PRINTS],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert (done.returncode, done.stderr) == (2, "error: [Errno 28] No space left on device\n")
