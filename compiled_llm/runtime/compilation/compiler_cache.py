"""Where the compiler keeps what it made while an engine compiles: a directory that nobody else can write to.

Inductor's default is /tmp/torchinductor_USER, which another user may have made first, and from which it loads libraries by
predictable names. While no engine compiles, the process's compiler uses its own directory.
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
from unittest.mock import patch

from compiled_llm.system.cpu import instruction_set
from compiled_llm.system.file_trust import make_private_directory, untrusted_reason
from compiled_llm.system.paths import cache_dir

_INDUCTOR, _TRITON = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"

_lock = threading.Lock()
_users = 0
_patches = ExitStack()


@contextmanager
def private_compiler_cache() -> Iterator[None]:
    """Let Inductor and Triton use the engine's own directory, unless the user chose theirs by environment variable.

    The variables are the process's: several threads may be in here, and the last one to leave restores what was there.
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
    from torch._inductor import codecache
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Inductor sets both variables itself, to its default, where they are not set when it first needs the directory.
    if os.environ.get(_INDUCTOR) in (None, default_cache_dir()):
        directory = _directory(cache_dir())
        headers = os.path.join(directory, "precompiled_headers")
        patches.enter_context(_variable(_INDUCTOR, directory))
        patches.enter_context(patch.object(codecache, "_HEADER_DIR", headers))
        patches.enter_context(
            patch.object(codecache, "_HEADER_LOCK_DIR", os.path.join(headers, "locks"))
        )
        if os.environ.get(_TRITON, default_cache_dir()).startswith(default_cache_dir()):
            patches.enter_context(_variable(_TRITON, os.path.join(directory, "triton")))


@cache
def _directory(parent: Path) -> str:
    """One for each kind of processor, since names of libraries do not tell for which `-march=native` stood."""
    directory = parent / "inductor" / instruction_set()
    try:
        make_private_directory(directory)
        if untrusted_reason(directory) is None and os.access(directory, os.W_OK):
            return str(directory)
    except OSError:
        pass  # a read-only cache, say
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
