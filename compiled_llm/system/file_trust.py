"""Check that no other user can change a file before code is loaded from it."""

import os
import stat
from pathlib import Path

from compiled_llm.errors import UntrustedFileError


def untrusted_reason(path: Path) -> str | None:
    """Return the reason, in one line, why other users could change a path, or None.

    The path, each directory above it and those that its symbolic links lead through must belong to
    this user or root, without write permission for group or others. A directory above the path may
    have that permission with the sticky bit, as /tmp has. Missing paths are not checked.
    """
    absolute, resolved = Path(os.path.abspath(path)), path.resolve()
    for place in dict.fromkeys([absolute, resolved, *absolute.parents, *resolved.parents]):
        found = _untrusted_reason_of(place, may_be_sticky=place not in (absolute, resolved))
        if found is not None:
            return found
    return None


def make_private_directory(directory: Path) -> None:
    """Create a directory and its missing parents for this user only; raises OSError."""
    if directory.is_dir():
        return
    make_private_directory(directory.parent)
    directory.mkdir(mode=0o700, exist_ok=True)


def read_trusted(path: Path) -> bytes:
    """Return the contents of a file.

    Raises:
        UntrustedFileError: another user could have written it.
        OSError: it cannot be read.
    """
    reason = untrusted_reason(path)
    if reason is not None:
        raise UntrustedFileError(reason)
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
        mode = stat.S_IMODE(status.st_mode)
        return f"others may write to {place} (mode {mode:o}): run `chmod go-w {place}`"
    return None
