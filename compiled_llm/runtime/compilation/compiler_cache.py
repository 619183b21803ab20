"""The directory of Inductor's and Triton's caches while an engine compiles.

Inductor's default is /tmp/torchinductor_USER. Another user may have created that directory, and
Inductor loads libraries from it by predictable names. The engine's directory belongs to the user.
While no engine compiles, the process's compiler uses its own directory.
"""

import atexit
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from compiled_llm.system.cpu import instruction_set
from compiled_llm.system.file_trust import make_private_directory, untrusted_reason
from compiled_llm.system.paths import cache_dir
from compiled_llm.system.torch_patches import (
    DEFAULT_CACHE_DIR,
    HEADER_DIR,
    HEADER_LOCK_DIR,
)

_INDUCTOR, _TRITON = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"

_lock = threading.Lock()
_users = 0
_patches = ExitStack()


@contextmanager
def private_compiler_cache() -> Iterator[None]:
    """Use the engine's directory for the caches of Inductor and Triton.

    A directory that the user chose by environment variable stays in use. The variables belong to
    the process: several threads may enter, and the last one to leave restores them.
    """
    global _users
    with _lock:
        if not _users:
            with ExitStack() as patches:
                _enter(patches)
                _patches.push(patches.pop_all())
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _patches.close()


def _enter(patches: ExitStack) -> None:
    default = DEFAULT_CACHE_DIR.get()()
    # Inductor sets an unset variable to its default when it first needs the directory.
    if os.environ.get(_INDUCTOR) in (None, default):
        directory = _directory(cache_dir())
        headers = os.path.join(directory, "precompiled_headers")
        patches.enter_context(_variable(_INDUCTOR, directory))
        patches.enter_context(HEADER_DIR.patch(headers))
        patches.enter_context(HEADER_LOCK_DIR.patch(os.path.join(headers, "locks")))
        if os.environ.get(_TRITON, default).startswith(default):
            patches.enter_context(_variable(_TRITON, os.path.join(directory, "triton")))


@cache
def _directory(parent: Path) -> str:
    """Return the directory for this processor, or a temporary one if it is unusable.

    Each instruction set has its own: the names of libraries do not depend on the processor, while
    `-march=native` does.
    """
    directory = parent / "inductor" / instruction_set()
    try:
        make_private_directory(directory)
        if untrusted_reason(directory) is None and os.access(directory, os.W_OK):
            return str(directory)
    except OSError:
        pass  # the cache is read-only, for example
    temporary = tempfile.mkdtemp(prefix="compiled_llm-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
