"""A value that Inductor is to keep in memory, rather than compute again in each kernel that reads it."""

from functools import cache

import torch
from torch import Tensor

from passes.ops.library import define_op
from passes.torch_internals import REGISTER_LOWERING


def materialize_reference(value: Tensor) -> Tensor:
    """The value itself."""
    return value.clone()


@cache
def register_materialize_lowering() -> None:
    """Have Inductor write the value to a buffer where it stands; without this, the op is a launch of its own."""

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
