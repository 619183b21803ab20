"""Options of programmatic dependent launch."""

import pytest
import torch

from passes.ops import pdl


@pytest.fixture(params=[None, (8, 0), (9, 0)], ids=["no-gpu", "ampere", "hopper"])
def is_supported(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Set the compute capability of the GPU; return whether it has PDL."""
    capability = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(pdl, "_is_supported", pdl._is_supported.__wrapped__)
    return capability == (9, 0)


def test_kernels_wait_where_they_are_launched_early(is_supported: bool) -> None:
    options = pdl.pdl_launch_options()
    assert options["USE_PDL"] is is_supported
    assert options.get("launch_pdl", False) is is_supported


def test_inductor_uses_it_in_small_steps(is_supported: bool) -> None:
    enabled = {"triton.enable_pdl": True} if is_supported else {}
    assert pdl.inductor_pdl_options(pdl.MAX_TOKENS) == enabled
    assert pdl.inductor_pdl_options(pdl.MAX_TOKENS + 1) == {}
