"""Argmax of chunks with Gumbel noise: the kernel against the reference, and the noise itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from passes.ops.gumbel_argmax import (
    CHUNK,
    add_gumbel_noise,
    gumbel_argmax_kernel,
    gumbel_argmax_reference,
    gumbel_noise,
)
from tests.conftest import DEVICE

INF = float("inf")
# Triton's interpreter computes with numpy, which has no bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_scores", [7, CHUNK, 2 * CHUNK + 1, 50257])
def test_kernel_without_noise(num_scores: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scores = torch.randn(5, num_scores, device=DEVICE, dtype=dtype)
    scores[1] = scores[1].round()  # of equal scores, the first is returned
    scores[2] = -INF
    scores[2, num_scores // 2] = -3.0
    padded = torch.cat([scores, scores], 1)[:, :num_scores]
    for strided in (scores, scores.t().contiguous().t(), padded):
        maxima, ids = gumbel_argmax_kernel(strided, None, None)
        expected, _ = gumbel_argmax_reference(scores, None, None)
        assert torch.equal(maxima, expected)
        argmax = ids.gather(1, maxima.argmax(-1, keepdim=True)).squeeze(1)
        assert argmax.tolist() == [int((row == row.max()).nonzero()[0]) for row in scores]


@pytest.mark.gpu
def test_kernel_with_noise() -> None:
    """The bits of the noise are equal; its logarithms may differ in the last place, and so ids."""
    torch.manual_seed(0)
    scores = 3 * torch.randn(64, 3 * CHUNK - 5, device=DEVICE)
    temperature = torch.tensor([0.0, 0.3, 1.0, 2.5], device=DEVICE).repeat(16)
    key = torch.randint(-(2**31), 2**31, (64,), device=DEVICE, dtype=torch.int64).int()
    maxima, ids = gumbel_argmax_kernel(scores, temperature, key)
    expected, _ = gumbel_argmax_reference(scores, temperature, key)
    torch.testing.assert_close(maxima, expected, rtol=1e-4, atol=1e-4)
    noisy = add_gumbel_noise(scores, temperature, key)
    torch.testing.assert_close(noisy.gather(1, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [None, 0.0, 1.0])
@pytest.mark.parametrize("op", [gumbel_argmax_kernel, gumbel_argmax_reference])
def test_chunk_with_nan_is_not_finite(
    op: Callable[..., tuple[Tensor, Tensor]], temperature: float | None
) -> None:
    scores = torch.zeros(3, CHUNK + 3, device=DEVICE)
    scores[0], scores[1, 7], scores[2, 9] = float("nan"), float("nan"), INF
    temperatures = None if temperature is None else torch.full((3,), temperature, device=DEVICE)
    keys = None if temperature is None else torch.arange(3, device=DEVICE, dtype=torch.int32)
    maxima, ids = op(scores, temperatures, keys)
    assert maxima.isfinite().tolist() == [[False, False], [False, True], [False, True]]
    assert 0 <= int(ids.min()) <= int(ids.max()) < CHUNK + 3


def test_noise_has_a_gumbel_distribution_and_depends_on_key_and_id_alone() -> None:
    noise = gumbel_noise(torch.tensor([1, -5, 2**31 - 1], dtype=torch.int32), 10**6)
    assert noise.isfinite().all()
    torch.testing.assert_close(noise.mean(1), torch.full((3,), 0.57722), rtol=0, atol=5e-3)
    torch.testing.assert_close(noise.var(1), torch.full((3,), torch.pi**2 / 6), rtol=2e-2, atol=0)
    assert torch.equal(noise[1:2, :1000], gumbel_noise(torch.tensor([-5], dtype=torch.int32), 1000))
