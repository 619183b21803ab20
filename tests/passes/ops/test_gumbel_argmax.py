"""The greatest scores of chunks: the kernel against the reference, and both against what noise must be."""

import pytest
import torch

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
@pytest.mark.parametrize("num_places", [7, CHUNK, 2 * CHUNK + 1, 50257])
def test_kernel_is_the_reference(num_places: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scores = torch.randn(5, num_places, device=DEVICE, dtype=dtype)
    scores[1] = scores[1].round()  # equals: the first of them counts
    scores[2] = -INF
    scores[2, num_places // 2] = -3.0
    for strided in (
        scores,
        scores.t().contiguous().t(),
        torch.cat([scores, scores], 1)[:, :num_places],
    ):
        best, place = gumbel_argmax_kernel(strided, None, None)
        expected, _ = gumbel_argmax_reference(scores, None, None)
        assert torch.equal(best, expected)
        ids = place.gather(1, best.argmax(-1, keepdim=True)).squeeze(1)
        assert ids.tolist() == [int((row == row.max()).nonzero()[0]) for row in scores]


@pytest.mark.gpu
def test_drawn_by_the_kernel_as_by_the_reference() -> None:
    """The noise's bits are the same; its logarithms may differ in the last place, so that what is chosen may tie."""
    torch.manual_seed(0)
    scores = 3 * torch.randn(64, 3 * CHUNK - 5, device=DEVICE)
    temperature = torch.tensor([0.0, 0.3, 1.0, 2.5], device=DEVICE).repeat(16)
    key = torch.randint(-(2**31), 2**31, (64,), device=DEVICE, dtype=torch.int64).int()
    best, place = gumbel_argmax_kernel(scores, temperature, key)
    expected, _ = gumbel_argmax_reference(scores, temperature, key)
    torch.testing.assert_close(best, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        add_gumbel_noise(scores, temperature, key).gather(1, place), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [None, 0.0, 1.0])
def test_a_chunk_with_nan_is_not_finite_and_places_are_places(temperature: float | None) -> None:
    scores = torch.zeros(3, CHUNK + 3, device=DEVICE)
    scores[0], scores[1, 7], scores[2, 9] = float("nan"), float("nan"), INF
    rows = None if temperature is None else torch.full((3,), temperature, device=DEVICE)
    key = None if temperature is None else torch.arange(3, device=DEVICE, dtype=torch.int32)
    for maxima in (gumbel_argmax_kernel, gumbel_argmax_reference):
        best, place = maxima(scores, rows, key)
        assert best.isfinite().tolist() == [[False, False], [False, True], [False, True]]
        assert 0 <= int(place.min()) <= int(place.max()) < CHUNK + 3


def test_noise_is_gumbels_and_a_function_of_key_and_place() -> None:
    noise = gumbel_noise(torch.tensor([1, -5, 2**31 - 1], dtype=torch.int32), 10**6)
    assert noise.isfinite().all()
    torch.testing.assert_close(noise.mean(1), torch.full((3,), 0.57722), rtol=0, atol=5e-3)
    torch.testing.assert_close(noise.var(1), torch.full((3,), torch.pi**2 / 6), rtol=2e-2, atol=0)
    assert torch.equal(noise[1:2, :1000], gumbel_noise(torch.tensor([-5], dtype=torch.int32), 1000))
