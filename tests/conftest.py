"""Settings shared by all tests; importing this module first sets the environment."""

import os
from pathlib import Path

# One thread: the models are tiny, and synchronizing threads costs more than they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Triton reads this variable when kernels are defined. Its interpreter runs them without a GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def pytest_report_header() -> str:
    """Return the machine's properties that affect results on a CPU."""
    # Imports the Triton kernels, which need TRITON_INTERPRET.
    from passes.ops.cpu.vector_isa import vector_isa

    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"CPU: torch uses {capability}, C++ kernels use {vector_isa()}; {threads} threads"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests in tests/gpu with `gpu`, and skip them without a GPU.

    Other tests that are marked `gpu` run on a GPU too, and without one on the CPU.
    """
    for item in items:
        if Path(item.fspath).parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)
            if DEVICE.type != "cuda":
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
