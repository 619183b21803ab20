"""The choice of a vector instruction set for the C++ kernels."""

import platform

import pytest
import torch

from passes.ops.cpu.vector_isa import AVX2, AVX512, DEFAULT, NEON, VectorISA, supported_vector_isas

REGISTERS = {AVX512: 32, AVX2: 16, NEON: 32, DEFAULT: 16}


@pytest.mark.parametrize(
    ("machine", "capability", "expected"),
    [
        ("x86_64", "AVX512", [AVX512, AVX2, DEFAULT]),
        ("x86_64", "AVX2", [AVX2, DEFAULT]),
        ("x86_64", "DEFAULT", [DEFAULT]),
        ("aarch64", "DEFAULT", [NEON]),
        ("aarch64", "SVE256", [NEON]),
        ("riscv64", "DEFAULT", [DEFAULT]),
    ],
)
def test_supported_sets_follow_the_processor(
    machine: str, capability: str, expected: list[VectorISA], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert supported_vector_isas() == expected


@pytest.mark.parametrize("isa", REGISTERS, ids=lambda isa: isa.name)
def test_tiles_fit_the_registers(isa: VectorISA) -> None:
    """Check a linear tile of 2 features and a 6 x 2 block of prefill attention, with operands."""
    assert 2 * isa.linear_tokens + 2 <= REGISTERS[isa]
    assert REGISTERS[isa] >= 6 * 2 + 2 + 1
    assert isa.width in (4, 8, 16)


def test_each_set_has_its_own_source() -> None:
    prefixes = {isa.source_prefix for isa in (AVX512, AVX2, NEON, DEFAULT)}
    assert len(prefixes) == 4
    assert str(AVX2) == "avx2: vectors of 8 floats, linear tiles of 2 features x 4 tokens"
