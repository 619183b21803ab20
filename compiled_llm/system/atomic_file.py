"""Files that are there whole or not at all, whoever reads them meanwhile and whatever ends the process that writes."""

import fcntl
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from compiled_llm.system.file_trust import make_private_directory

_UNFINISHED, _LOCK = ".unfinished-", ".lock"
_PATIENCE = 60.0  # seconds


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file, in directories made for it and for this user alone, in place of one that is there; raises OSError."""
    make_private_directory(path.parent)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=_UNFINISHED)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


@contextmanager
def locked(directory: Path, *, patience: float | None = None) -> Iterator[None]:
    """One process at a time; the lock goes with the process that holds it.

    Args:
        directory: made where it is missing, for this user alone.
        patience: seconds to wait for another process that has the lock, which may be stopped; a minute by default.

    Raises:
        TimeoutError: an OSError; another process still has the lock.
        OSError: the directory cannot be written to.
    """
    make_private_directory(directory)
    descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        _wait_for(descriptor, directory, _PATIENCE if patience is None else patience)
        yield
    finally:
        os.close(descriptor)


def remove_unfinished(paths: Iterable[Path]) -> None:
    """Of these, remove what processes that were killed left; who calls this has the lock that all who write there take."""
    for path in paths:
        if path.name.startswith(_UNFINISHED):
            path.unlink(missing_ok=True)


def _wait_for(descriptor: int, directory: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"another process has had the lock of {directory} for {patience:g} s"
                ) from None
            time.sleep(0.02)
