"""Settings and helpers shared by all tests."""

import os
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the models are tiny: threads that wait for each other cost more than they bring

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which must be asked for before they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def pytest_report_header() -> str:
    """Return what of this machine the results on a CPU depend on."""
    from passes.ops.cpu.vector_isa import (
        vector_isa,  # with the Triton kernels, so after the setting above
    )

    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"vector units: torch's {capability}, C++ kernels for {vector_isa()}; {threads} threads"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in tests/gpu need a GPU; the others run anywhere, and on a GPU too when they are marked `gpu`."""
    for item in items:
        if Path(item.fspath).parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)
            if DEVICE.type != "cuda":
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
