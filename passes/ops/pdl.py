"""Launching a kernel while the one before it still runs: programmatic dependent launch, from Hopper on.

Each kernel of a step, ours and Inductor's, waits in itself for the end of the one before it, before it touches anything that
kernels write. So the end of one is the end of all before it, and what a kernel does until then (to be launched, to compute
addresses, to fetch weights, which nothing writes) costs no time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from passes.torch_internals import PDL_WAIT, TRITON_KERNEL

MAX_TOKENS = 64


@cache
def _is_supported() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def pdl_launch_options() -> dict[str, Any]:
    """What a kernel of ours is launched with; its EARLY says that it must wait."""
    return {"USE_PDL": True, "launch_pdl": True} if _is_supported() else {"USE_PDL": False}


def inductor_pdl_options(num_tokens: int) -> dict[str, Any]:
    """The settings with which Inductor launches its kernels early, to be used within `inductor_waits`.

    Of more tokens, kernels fill the GPU, and one that waits only stands in the way (on an H200 it cost 2 to 5 % at 128).
    """
    return {"triton.enable_pdl": True} if _is_supported() and num_tokens <= MAX_TOKENS else {}


@contextmanager
def inductor_pdl_waits() -> Iterator[None]:
    """Have every kernel that Inductor generates wait before it first reads or writes.

    By itself, Inductor lets a kernel go ahead that touches nothing of the kernel just before it, and one that reads nothing never
    waits. The kernel after that would wait for it alone, while an earlier one might still run.
    """

    def wait(kernel: Any, buffer: Any, *accessed: str, consider_reads: bool = False) -> None:
        if kernel._enable_pdl_codegen():
            in_loop = kernel.inside_reduction and kernel.range_trees[-1].is_loop
            (kernel.body if in_loop else buffer).writeline(
                kernel.GDC_WAIT
            )  # all but the first are dropped later

    TRITON_KERNEL.get()
    with PDL_WAIT.patch(wait):
        yield
