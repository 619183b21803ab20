"""Fixtures of the tests of passes and ops."""

import pytest

from passes.ops import cpu
from passes.ops.cpu.vector_isa import NEON, supported_vector_isas


@pytest.fixture(
    params=list(dict.fromkeys([*supported_vector_isas(), NEON])), ids=lambda isa: str(isa.name)
)
def vector_isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile the C++ kernels for each instruction set of the processor, and with NEON's sizes.

    NEON's sizes work on any processor, because vectors of 4 floats do.
    """
    monkeypatch.setattr(cpu, "vector_isa", lambda: request.param)
