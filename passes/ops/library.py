"""Definition of custom ops in the torch library `compiled_llm` (`torch.ops.compiled_llm.*`)."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch

NAMESPACE = "compiled_llm"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
# The CUDA implementation of each op, by overload.
KERNELS: dict[object, Callable[..., object]] = {}


class _ThreadState(threading.local):
    use_references = False


_STATE = _ThreadState()


@contextmanager
def use_references() -> Iterator[None]:
    """Run the references of ops that this thread calls, on any device.

    Kernels that a CUDA graph has captured are not affected.
    """
    before = _STATE.use_references
    try:
        _STATE.use_references = True
        yield
    finally:
        _STATE.use_references = before


def define_op(
    schema: str,
    *,
    reference: Callable[..., object],
    kernel: Callable[..., object],
    fake: Callable[..., object],
    cpu: Callable[..., object] | None = None,
) -> torch._ops.OpOverload:
    """Define a custom op and register its implementations.

    Args:
        schema: `name(arguments) -> returns`; mutated arguments are annotated, as in `Tensor(a!)`.
        reference: implementation in plain PyTorch, for devices without another one and within
            `use_references`.
        kernel: CUDA implementation.
        fake: returns outputs of the right shapes and dtypes, for tracing.
        cpu: CPU implementation, if the reference is too slow.

    Returns:
        The op's default overload.
    """
    name = schema.split("(", 1)[0]
    # With flexible_layout, Inductor passes tensors of any strides; kernels take strides as
    # arguments.
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
    """Return a function that runs the kernel, or the reference within `use_references`."""

    @wraps(kernel)
    def run(*args: object) -> object:
        return (reference if _STATE.use_references else kernel)(*args)

    return run
