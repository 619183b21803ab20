"""Vector instructions in Inductor's C++: which the compiler can make here, and where they must not be used.

Which there are is tried once on a machine, not once a process. Torch tries each by compiling a small library and loading it in a
process of its own, which imports torch: 16 seconds in all, on two cores, in every process that compiles or loads C++. Whether the
processor has the instructions is asked anew, always.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from compiled_llm.system.atomic_file import write_atomic
from compiled_llm.system.paths import cache_dir

# Inductor's own cache must not answer with what was generated without these patches, nor with loops over vectors of another size,
# which its key does not tell apart: compiled for the vectors here, they skip numbers or write past the end of a tensor.
TAG = f"compiled_llm {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]} {torch.backends.cpu.get_cpu_capability()}"


@contextmanager
def cached_vec_isa_checks() -> Iterator[None]:
    """Answer what was tried before, with the same compiler, flags and torch, from the cache directory."""
    from torch._inductor.cpu_vec_isa import VecISA, _get_isa_dry_compile_fingerprint

    check = VecISA.check_build

    def check_once(isa: Any, code: str) -> bool:
        tried = (
            f"{code}{_get_isa_dry_compile_fingerprint(isa.build_arch_flags())}{isa.build_macro()}"
        )
        path = cache_dir() / "vector_units" / hashlib.sha256(tried.encode()).hexdigest()[:16]
        if path.exists():
            return path.read_text() == "works"
        works: bool = check(isa, code)
        with suppress(OSError):  # then it is tried again
            write_atomic(path, b"works" if works else b"fails")
        return works

    with patch.object(VecISA, "check_build", check_once):
        yield


@contextmanager
def avx2_without_avx512() -> Iterator[None]:
    """Compile what Inductor generates for AVX2 without AVX-512.

    Inductor compiles with `-march=native` even where `cpp.simdlen` or ATEN_CPU_CAPABILITY choose AVX2 on a processor that has
    AVX-512. GCC 12 then compiles some of its vector code wrongly, and tokens are wrong.
    """
    from torch._inductor.cpu_vec_isa import VecAVX2

    with patch.object(VecAVX2, "_arch_flags", f"{VecAVX2._arch_flags} -mno-avx512f"):
        yield


@contextmanager
def safe_reduction_tiling() -> Iterator[None]:
    """Leave loops alone that Inductor would vectorize wrongly (pytorch#196681).

    Where a sum is inside a loop that is inside the one to vectorize, it forgets what is left over at the end of the latter: the
    sums are stored as a whole vector, past the end of the tensor or over its next row.
    """
    from torch._inductor.codegen.cpp import TilingSelect

    select = TilingSelect.select_tiling

    def select_safe(self: Any, functions: Any, sizes: Any) -> tuple[list[int], list[int]]:
        factors, loops = select(self, functions, sizes)
        kept, summed = max(sizes, key=lambda both: len(both[1]))
        outer = [loop % (len(kept) + len(summed)) for loop in loops]
        wrong = summed and any(
            n + 1 < len(kept) and kept[n] % factor != 0
            for n, factor in zip(outer, factors, strict=True)
        )
        return ([], []) if wrong else (factors, loops)

    with patch.object(TilingSelect, "select_tiling", select_safe):
        yield
