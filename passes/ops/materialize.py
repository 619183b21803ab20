"""A value that Inductor is to keep in memory, rather than compute again in each kernel that reads it."""

from functools import cache

import torch
from torch import Tensor

from passes.ops.library import define
from passes.torch_internals import REGISTER_LOWERING


def kept_reference(value: Tensor) -> Tensor:
    """The value itself."""
    return value.clone()


@cache
def teach_inductor() -> None:
    """Have Inductor write the value to a buffer where it stands; without this, the op is a launch of its own."""

    @REGISTER_LOWERING.get()(kept, type_promotion_kind=None)
    def _(value):  # type: ignore[no-untyped-def]
        value.realize()
        return value


kept = define(
    "kept(Tensor value) -> Tensor",
    reference=kept_reference,
    kernel=kept_reference,
    fake=torch.empty_like,
)
