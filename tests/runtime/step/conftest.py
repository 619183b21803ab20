"""Runs the tests of the samplers on the GPU where there is one."""

from collections.abc import Iterator

import pytest
import torch

from tests.conftest import DEVICE


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    """Create tensors on the GPU where there is one."""
    with torch.device(DEVICE):
        yield
