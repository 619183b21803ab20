"""Write files atomically, and lock directories between processes."""

import fcntl
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from compiled_llm.system.file_trust import make_private_directory

_UNFINISHED, _LOCK = ".unfinished-", ".lock"
_TIMEOUT = 60.0  # seconds


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file, so that readers see all of it or none, even if this process is killed.

    It replaces an existing file. Missing directories are created for this user only.

    Raises:
        OSError: the file cannot be written.
    """
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
def locked(directory: Path, *, timeout: float | None = None) -> Iterator[None]:
    """Lock a directory for one process; the lock is released if the process dies.

    Args:
        directory: created for this user only if it is missing.
        timeout: seconds to wait for another process that holds the lock; a minute by default.

    Raises:
        TimeoutError: an OSError; another process still holds the lock.
        OSError: the directory cannot be written to.
    """
    make_private_directory(directory)
    descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        _wait_for(descriptor, directory, _TIMEOUT if timeout is None else timeout)
        yield
    finally:
        os.close(descriptor)


def remove_unfinished(paths: Iterable[Path]) -> None:
    """Remove those of the paths that killed processes left behind.

    The caller holds the lock that all writers of these paths take.
    """
    for path in paths:
        if path.name.startswith(_UNFINISHED):
            path.unlink(missing_ok=True)


def _wait_for(descriptor: int, directory: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"another process has held the lock of {directory} for {timeout:g} s"
                ) from None
            time.sleep(0.02)
