"""Which files may be run as code: those that nobody but this user and root can write."""

import os
import stat
from pathlib import Path

from compiled_llm.errors import UntrustedFileError


def untrusted_reason(path: Path) -> str | None:
    """Why other users could change what a path holds, in one line; None where they cannot.

    The path, each directory above it, and those that its symbolic links lead through must belong to this user or root, and have
    no write permission for group or others; a directory above it may have that with the sticky bit, as /tmp does. What does not
    exist is not looked at.
    """
    absolute, resolved = Path(os.path.abspath(path)), path.resolve()
    for place in dict.fromkeys([absolute, resolved, *absolute.parents, *resolved.parents]):
        found = _untrusted_reason_of(place, may_be_sticky=place not in (absolute, resolved))
        if found is not None:
            return found
    return None


def make_private_directory(directory: Path) -> None:
    """Make a directory, and those above it that are missing, for this user alone; raises OSError."""
    if directory.is_dir():
        return
    make_private_directory(directory.parent)
    directory.mkdir(mode=0o700, exist_ok=True)


def read_trusted(path: Path) -> bytes:
    """What a file holds.

    Raises:
        UntrustedFileError: another user could have written it.
        OSError: it cannot be read.
    """
    why = untrusted_reason(path)
    if why is not None:
        raise UntrustedFileError(why)
    return path.read_bytes()


def _untrusted_reason_of(place: Path, *, may_be_sticky: bool) -> str | None:
    try:
        status = place.lstat()
    except OSError:
        return None
    if status.st_uid not in (os.geteuid(), 0):
        return f"{place} belongs to another user (uid {status.st_uid}): expected this user or root"
    if stat.S_ISLNK(status.st_mode) or (may_be_sticky and status.st_mode & stat.S_ISVTX):
        return None
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {place} (mode {stat.S_IMODE(status.st_mode):o}): take that away with `chmod go-w {place}`"
    return None
