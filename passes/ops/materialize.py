"""The identity, as an op that makes Inductor write its argument to a buffer.

Inductor otherwise inlines a pointwise value into each kernel that reads it.
"""

from functools import cache

import torch
from torch import Tensor

from passes.ops.library import define_op
from passes.torch_internals import REGISTER_LOWERING


def materialize_reference(value: Tensor) -> Tensor:
    """Return a copy of `value`."""
    return value.clone()


@cache
def register_materialize_lowering() -> None:
    """Register the op's lowering with Inductor, which realizes the argument's buffer.

    Without it, the op is a kernel launch of its own.
    """

    @REGISTER_LOWERING.get()(materialize, type_promotion_kind=None)
    def _(value):  # type: ignore[no-untyped-def]
        value.realize()
        return value


materialize = define_op(
    "materialize(Tensor value) -> Tensor",
    reference=materialize_reference,
    kernel=materialize_reference,
    fake=torch.empty_like,
)
