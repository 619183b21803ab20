"""The vector instructions that the C++ kernels are compiled for, and the sizes that fit their registers."""

import platform
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorISA:
    """A set of vector instructions.

    Attributes:
        name: as in `torch.backends.cpu.get_cpu_capability()` where torch has it, in lower case.
        width: float32 numbers in a register.
        linear_tokens: tokens in a tile of `skinny_linear`, a power of two. A tile has twice as many sums, which stay in
            registers: up to 8 sums where there are 16 registers, up to 16 where there are 32.
        excluded: target option that keeps the compiler from larger vector instructions that the processor has as well.
    """

    name: str
    width: int
    linear_tokens: int
    excluded: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: vectors of {self.width} floats, linear tiles of 2 features x {self.linear_tokens} tokens"

    @property
    def source_prefix(self) -> str:
        """What precedes the source of the kernels."""
        lines = [
            f"#define VECTOR_WIDTH {self.width}",
            f"#define LINEAR_TOKENS {self.linear_tokens}",
        ]
        if (
            self.excluded is not None
        ):  # a flag would have no effect, because Inductor's own flags follow it
            lines.insert(0, f'#pragma GCC target("{self.excluded}")')
        return "\n".join([*lines, ""])


AVX512 = VectorISA(name="avx512", width=16, linear_tokens=8)  # 32 registers
AVX2 = VectorISA(name="avx2", width=8, linear_tokens=4, excluded="no-avx512f")  # 16 registers
NEON = VectorISA(
    name="neon", width=4, linear_tokens=8
)  # 32 registers; processors with SVE have NEON too
DEFAULT = VectorISA(name="default", width=4, linear_tokens=4)  # 16 registers, as SSE2 has


def supported_vector_isas() -> list[VectorISA]:
    """Return the sets that this processor has, the preferred one first.

    On x86 they follow torch's capability, so that `ATEN_CPU_CAPABILITY` limits these kernels as it limits torch's.
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
    """Return the set that the kernels are compiled for in this process."""
    return supported_vector_isas()[0]
