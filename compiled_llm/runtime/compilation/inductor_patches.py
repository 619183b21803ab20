"""Patches of Inductor's C++ code generation: vector instructions that fail or cost time."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from compiled_llm.system.atomic_file import write_atomic
from compiled_llm.system.paths import cache_dir
from compiled_llm.system.torch_patches import (
    AVX2_FLAGS,
    BUILD_FINGERPRINT,
    CHECK_BUILD,
    SELECT_TILING,
)

# Part of the key of Inductor's cache. Its own key holds neither these patches nor the vector width
# that the loops were generated for; code that is compiled for another width skips elements or
# writes past the end of a tensor.
_SOURCE_DIGEST = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
CACHE_TAG = f"compiled_llm {_SOURCE_DIGEST} {torch.backends.cpu.get_cpu_capability()}"


@contextmanager
def cached_vec_isa_checks() -> Iterator[None]:
    """Cache on disk which vector instructions the C++ compiler supports.

    torch checks each instruction set by compiling a small library and loading it in a process that
    imports torch: 16 seconds in all on two cores, in every process that compiles or loads C++. The
    key of the cache is the compiler, its flags and torch. Whether the processor has the
    instructions is not cached.
    """
    check_build = CHECK_BUILD.get()

    def check_once(isa: Any, code: str) -> bool:
        build = BUILD_FINGERPRINT.get()(isa.build_arch_flags())
        key = hashlib.sha256(f"{code}{build}{isa.build_macro()}".encode()).hexdigest()[:16]
        path = cache_dir() / "vector_units" / key
        if path.exists():
            return path.read_text() == "works"
        works: bool = check_build(isa, code)
        with suppress(OSError):  # the next process checks again
            write_atomic(path, b"works" if works else b"fails")
        return works

    with CHECK_BUILD.patch(check_once):
        yield


@contextmanager
def avx2_without_avx512() -> Iterator[None]:
    """Compile the code that Inductor generates for AVX2 without AVX-512.

    Inductor passes `-march=native` to the compiler even where `cpp.simdlen` or ATEN_CPU_CAPABILITY
    select AVX2 on a processor with AVX-512. GCC 12 miscompiles some of that vector code, and the
    tokens are wrong.
    """
    with AVX2_FLAGS.patch(f"{AVX2_FLAGS.get()} -mno-avx512f"):
        yield


@contextmanager
def safe_reduction_tiling() -> Iterator[None]:
    """Keep loops scalar that Inductor would vectorize incorrectly (pytorch#196681).

    Where a sum is in a loop inside the vectorized loop, Inductor ignores the remainder of the
    vectorized loop: it stores the sums as a whole vector, past the end of the tensor or over its
    next row.
    """
    select_tiling = SELECT_TILING.get()

    def select_safe(self: Any, functions: Any, sizes: Any) -> tuple[list[int], list[int]]:
        factors, loops = select_tiling(self, functions, sizes)
        outer_sizes, summed = max(sizes, key=lambda both: len(both[1]))
        outer = [loop % (len(outer_sizes) + len(summed)) for loop in loops]
        wrong = summed and any(
            n + 1 < len(outer_sizes) and outer_sizes[n] % factor != 0
            for n, factor in zip(outer, factors, strict=True)
        )
        return ([], []) if wrong else (factors, loops)

    with SELECT_TILING.patch(select_safe):
        yield
