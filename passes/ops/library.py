"""The one torch library that the project's custom ops live in: `torch.ops.compiled_llm.*`."""

from collections.abc import Callable

import torch

NAMESPACE = "compiled_llm"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
# What runs each op on a GPU.
KERNELS: dict[object, Callable[..., object]] = {}


def define(
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
        reference: the plain-PyTorch implementation, which runs wherever `kernel` does not.
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
    LIBRARY.impl(name, kernel, "CUDA")
    if cpu is not None:
        LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    KERNELS[overload] = kernel
    return overload
