"""The vector instruction set of the C++ kernels, and tile sizes that fit its registers."""

import platform
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorISA:
    """A vector instruction set.

    Attributes:
        name: the name that `torch.backends.cpu.get_cpu_capability()` returns for it, if any, in
            lower case.
        width: float32 numbers per register.
        linear_tokens: tokens of a tile of `skinny_linear`, a power of two. A tile has twice as many
            sums, which are kept in registers: at most 8 with 16 registers, 16 with 32.
        excluded: GCC target option that disables the wider instructions of the processor, if any.
    """

    name: str
    width: int
    linear_tokens: int
    excluded: str | None = None

    def __str__(self) -> str:
        return (
            f"{self.name}: vectors of {self.width} floats, "
            f"linear tiles of 2 features x {self.linear_tokens} tokens"
        )

    @property
    def source_prefix(self) -> str:
        """The preprocessor lines that precede the source of the kernels."""
        lines = [
            f"#define VECTOR_WIDTH {self.width}",
            f"#define LINEAR_TOKENS {self.linear_tokens}",
        ]
        if self.excluded is not None:
            # A compiler flag would have no effect, because Inductor's own flags follow it.
            lines.insert(0, f'#pragma GCC target("{self.excluded}")')
        return "\n".join([*lines, ""])


AVX512 = VectorISA(name="avx512", width=16, linear_tokens=8)  # 32 registers
AVX2 = VectorISA(name="avx2", width=8, linear_tokens=4, excluded="no-avx512f")  # 16 registers
# 32 registers. Processors with SVE support NEON as well.
NEON = VectorISA(name="neon", width=4, linear_tokens=8)
DEFAULT = VectorISA(name="default", width=4, linear_tokens=4)  # 16 registers, as SSE2 has


def supported_vector_isas() -> list[VectorISA]:
    """Return the sets that this processor supports, the preferred one first.

    On x86 they follow torch's CPU capability, so that the environment variable
    `ATEN_CPU_CAPABILITY` limits these kernels as it limits torch's.
    """
    machine = platform.machine()
    if machine in ("aarch64", "arm64"):
        return [NEON]
    if machine not in ("x86_64", "AMD64"):
        return [DEFAULT]
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": [AVX512, AVX2, DEFAULT], "AVX2": [AVX2, DEFAULT]}.get(capability, [DEFAULT])


@cache
def vector_isa() -> VectorISA:
    """Return the set for which this process compiles the kernels."""
    return supported_vector_isas()[0]
