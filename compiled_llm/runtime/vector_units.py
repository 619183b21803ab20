"""Which vector instructions the C++ compiler can make here: tried once on a machine, not once a process.

Torch tries each by compiling a small library and loading it in a process of its own, which imports torch: 16 seconds in all, on
two cores, in every process that compiles or loads C++. Whether the processor has the instructions is asked anew, always.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import patch

from compiled_llm.models.default import cache_dir
from compiled_llm.runtime.whole_files import write_whole


@contextmanager
def remembered() -> Iterator[None]:
    """Answer what was tried before, with the same compiler, flags and torch, from the cache directory."""
    from torch._inductor.cpu_vec_isa import VecISA, _get_isa_dry_compile_fingerprint

    check = VecISA.check_build

    def check_once(isa: Any, code: str) -> bool:
        tried = f"{code}{_get_isa_dry_compile_fingerprint(isa.build_arch_flags())}{isa.build_macro()}"
        path = cache_dir() / "vector_units" / hashlib.sha256(tried.encode()).hexdigest()[:16]
        if path.exists():
            return path.read_text() == "works"
        works: bool = check(isa, code)
        with suppress(OSError):  # then it is tried again
            write_whole(path, b"works" if works else b"fails")
        return works

    with patch.object(VecISA, "check_build", check_once):
        yield
