"""Programmatic dependent launch (PDL): a kernel starts while the preceding one still runs.

Available from compute capability 9.0 (Hopper) on. Every kernel of a step, this package's and
Inductor's, executes `griddepcontrol.wait` before it accesses memory that kernels write. The end of
a kernel thus implies the end of all kernels before it, and the work ahead of the wait is hidden:
the launch itself, address computation, and loads of weights, which no kernel writes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from passes.torch_internals import PDL_WAIT, TRITON_KERNEL

# Kernels over more tokens fill the GPU, and a kernel that waits occupies it: at 128 tokens PDL
# cost 2 to 5 % on an H200.
MAX_TOKENS = 64


@cache
def _is_supported() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def pdl_launch_options() -> dict[str, Any]:
    """Return the launch arguments of a kernel that has the constexpr `USE_PDL`."""
    return {"USE_PDL": True, "launch_pdl": True} if _is_supported() else {"USE_PDL": False}


def inductor_pdl_options(num_tokens: int) -> dict[str, Any]:
    """Return the Inductor options that launch its kernels with PDL in a step of `num_tokens`.

    They must be used within `inductor_pdl_waits`.
    """
    return {"triton.enable_pdl": True} if _is_supported() and num_tokens <= MAX_TOKENS else {}


@contextmanager
def inductor_pdl_waits() -> Iterator[None]:
    """Make every kernel that Inductor generates wait before its first access to memory.

    By default, Inductor omits the wait in a kernel that does not depend on the kernel just before
    it. A third kernel, which waits for that one alone, could then run while an earlier kernel
    still does.
    """

    def wait(kernel: Any, buffer: Any, *accessed: str, consider_reads: bool = False) -> None:
        if kernel._enable_pdl_codegen():
            in_loop = kernel.inside_reduction and kernel.range_trees[-1].is_loop
            target = kernel.body if in_loop else buffer
            target.writeline(kernel.GDC_WAIT)  # Inductor drops all but the first later

    TRITON_KERNEL.get()
    with PDL_WAIT.patch(wait):
        yield
