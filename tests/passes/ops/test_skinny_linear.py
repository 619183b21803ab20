"""The linear layer over few tokens: kernels against the reference, and their tile sizes."""

import pytest
import torch
from torch import Tensor

from passes.ops import skinny_linear as skinny_linear_module
from passes.ops.skinny_linear import (
    skinny_linear_cpu,
    skinny_linear_kernel,
    skinny_linear_reference,
)
from tests.conftest import DEVICE

# Triton's interpreter computes with numpy, which has no bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
Shape = tuple[int, int, int]
# gated, residual
OPTIONS = [(False, False), (True, False), (False, True)]
# tokens, output features, input features
SHAPES = [
    (1, 96, 160),
    (1, 100, 72),
    (2, 100, 72),
    (3, 96, 160),
    (4, 40, 600),
    (16, 100, 72),
    (17, 96, 512),
    (32, 40, 600),
]
# Sizes that leave partial tiles of features, of tokens and of sums.
CPP_SHAPES = [(1, 5, 20), (3, 7, 33), (7, 6, 50), (8, 64, 100), (9, 65, 64), (32, 40, 64)]

Arguments = tuple[Tensor, Tensor, Tensor | None, float, Tensor | None, bool]


def make_arguments(
    shape: Shape, *, gated: bool, residual: bool, norm: bool,
    dtype: torch.dtype = torch.float32, device: torch.device = DEVICE,
) -> Arguments:  # fmt: skip
    torch.manual_seed(0)
    num_tokens, num_out, num_in = shape
    # The rows of x are apart, as those of a slice of a product are.
    x = torch.randn(num_tokens, 2 * num_in, device=device, dtype=dtype)[:, :num_in]
    weight = torch.randn(num_out * (1 + gated), num_in, device=device, dtype=dtype) / num_in**0.5
    scale = torch.rand(num_in, device=device, dtype=dtype) + 0.5 if norm else None
    added = torch.randn(num_tokens, num_out, device=device, dtype=dtype) if residual else None
    return x, weight, scale, 1e-6, added, gated


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("gated", "residual"), OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape: Shape, gated: bool, residual: bool, norm: bool, dtype: torch.dtype) -> None:
    arguments = make_arguments(shape, gated=gated, residual=residual, norm=norm, dtype=dtype)
    if norm:
        expected = skinny_linear_reference(*arguments).double()
    else:
        double = [arg.double() if isinstance(arg, Tensor) else arg for arg in arguments]
        expected = skinny_linear_reference(*double)  # type: ignore[arg-type]
    actual = skinny_linear_kernel(*arguments).double()
    torch.testing.assert_close(actual, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.usefixtures("vector_isa")
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("gated", "residual"), OPTIONS)
@pytest.mark.parametrize("shape", CPP_SHAPES, ids=str)
def test_cpp(shape: Shape, gated: bool, residual: bool, norm: bool) -> None:
    x, weight, scale, eps, added, _ = make_arguments(
        shape, gated=gated, residual=residual, norm=norm, device=torch.device("cpu")
    )
    together = skinny_linear_cpu(x, weight, scale, eps, added, gated)
    expected = skinny_linear_reference(x, weight, scale, eps, added, gated)
    torch.testing.assert_close(together, expected)
    alone = []
    for t in range(len(x)):
        added_t = None if added is None else added[t : t + 1]
        alone.append(skinny_linear_cpu(x[t : t + 1], weight, scale, eps, added_t, gated))
    if gated:  # the exponential is computed for several tokens at once
        torch.testing.assert_close(torch.cat(alone), together, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(torch.cat(alone), together), "a token's sums depend on other tokens"


@pytest.mark.gpu
def test_column_major_inputs() -> None:
    """Inductor chooses the layout of a tensor: behind a convolution, features are apart."""
    torch.manual_seed(0)
    x, added = torch.randn(100, 3, device=DEVICE).t(), torch.randn(72, 3, device=DEVICE).t()
    weight = torch.randn(72, 100, device=DEVICE) / 10
    op = skinny_linear_cpu if DEVICE.type == "cpu" else skinny_linear_kernel
    actual = op(x, weight, None, 0.0, added, False)
    torch.testing.assert_close(actual, skinny_linear_reference(x, weight, None, 0.0, added, False))


@pytest.mark.parametrize("num_tokens", [3, 8, 16, 32])
@pytest.mark.parametrize(
    ("num_rows", "num_in"),
    [(64, 4096), (4096, 4096), (96, 20), (1024, 3072), (6144, 1024), (960, 576)],
)
def test_tiles_fit_matrix_instructions(num_tokens: int, num_rows: int, num_in: int) -> None:
    tiles = skinny_linear_module._matrix_tiles(num_tokens, num_rows, num_in)
    assert tiles["FIRST_K"] % tiles["TILE_K"] == 0
    assert tiles["TILE_K"] >= 16 * tiles["WARPS"]
    assert tiles["TILE_T"] >= num_tokens
