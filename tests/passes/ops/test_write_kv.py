"""The write of keys and values to the cache: reference and kernel."""

from collections.abc import Callable

import pytest
import torch

from passes.ops.write_kv import write_kv_kernel, write_kv_reference
from tests.conftest import DEVICE


@pytest.mark.gpu
@pytest.mark.parametrize("op", [write_kv_reference, write_kv_kernel])
def test_only_the_given_slots_are_written(op: Callable[..., None]) -> None:
    k = torch.randn(2, 5, 80, device=DEVICE).transpose(0, 1)
    v = torch.randn(2, 5, 48, device=DEVICE).transpose(0, 1)
    k_cache = torch.zeros(4, 16, 2, 80, device=DEVICE)
    v_cache = torch.zeros(4, 16, 2, 48, device=DEVICE)
    slots = torch.tensor([17, 63, 20, 48, 31], device=DEVICE)
    op(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache.view(64, 2, 80)[slots], k)
    assert torch.equal(v_cache.view(64, 2, 48)[slots], v)
    others = [slot for slot in range(64) if slot not in slots.tolist()]
    assert not k_cache.view(64, 2, 80)[others].any()
    assert not v_cache.view(64, 2, 48)[others].any()
