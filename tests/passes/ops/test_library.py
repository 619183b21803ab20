"""The choice between an op's reference and its kernel."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from passes.ops.library import KERNELS, define_op, use_references
from tests.conftest import DEVICE


def test_use_references_applies_to_its_thread_and_nests() -> None:
    def kernel(x: torch.Tensor) -> torch.Tensor:
        return x + 2

    op = define_op(
        "test_choice(Tensor x) -> Tensor",
        reference=lambda x: x + 1,
        kernel=kernel,
        cpu=kernel,
        fake=torch.empty_like,
    )
    x = torch.zeros(1, device=DEVICE)
    assert KERNELS[op] is kernel

    def value() -> int:
        return int(op(x))

    assert value() == 2
    with use_references(), ThreadPoolExecutor(1) as others:
        assert value() == 1
        assert others.submit(value).result() == 2
        with pytest.raises(KeyError), use_references():
            raise KeyError
        assert value() == 1
    assert value() == 2
