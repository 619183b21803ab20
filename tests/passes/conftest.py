"""Settings and helpers of the tests of ops and passes."""

import pytest

from passes.ops import cpu
from passes.ops.cpu.vector_isa import NEON, supported_vector_isas


@pytest.fixture(
    params=list(dict.fromkeys([*supported_vector_isas(), NEON])), ids=lambda isa: str(isa.name)
)
def vector_isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile the C++ kernels for each set of vector instructions of this processor, and with NEON's sizes, which any has."""
    monkeypatch.setattr(cpu, "vector_isa", lambda: request.param)
