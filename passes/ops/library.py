"""The one torch library that the project's custom ops live in: `torch.ops.compiled_llm.*`."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch

NAMESPACE = "compiled_llm"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
# What runs each op on a GPU.
KERNELS: dict[object, Callable[..., object]] = {}


class _Choice(threading.local):
    """What the ops that a thread calls run."""

    use_references = False


_CHOICE = _Choice()


@contextmanager
def use_references() -> Iterator[None]:
    """Have ops called in this thread run their references, on any device; what has been captured stays as it is."""
    before = _CHOICE.use_references
    try:
        _CHOICE.use_references = True
        yield
    finally:
        _CHOICE.use_references = before


def define_op(
    schema: str,
    *,
    reference: Callable[..., object],
    kernel: Callable[..., object],
    fake: Callable[..., object],
    cpu: Callable[..., object] | None = None,
) -> torch._ops.OpOverload:
    """Define one op.

    Args:
        schema: `name(arguments) -> returns`; mutated arguments are annotated, e.g. `Tensor(a!)`.
        reference: the plain-PyTorch implementation, which runs wherever `kernel` does not, and within `references`.
        kernel: the CUDA implementation.
        fake: shapes and dtypes of the result, for tracing.
        cpu: the CPU implementation, where the reference is not good enough.

    Returns:
        The op's default overload.
    """
    name = schema.split("(", 1)[0]
    # flexible_layout: Inductor hands over whatever strides it chose, so kernels take strides as arguments.
    LIBRARY.define(schema, tags=(torch.Tag.flexible_layout,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    LIBRARY.impl(name, _unless_references(kernel, reference), "CUDA")
    if cpu is not None:
        LIBRARY.impl(name, _unless_references(cpu, reference), "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    KERNELS[overload] = kernel
    return overload


def _unless_references(
    kernel: Callable[..., object], reference: Callable[..., object]
) -> Callable[..., object]:
    @wraps(kernel)
    def run(*args: object) -> object:
        return (reference if _CHOICE.use_references else kernel)(*args)

    return run
