"""A linear layer over few tokens, fused with the ops before and after it.

With few tokens, the time of a linear layer is that of reading its weight. One kernel reads it once
and also computes the RMSNorm of the input, the gate of a gated MLP and the addition to a residual.
With programmatic dependent launch it loads weights while the preceding kernel still runs.

Shape suffixes:
    T: tokens
    N: output features
    K: input features

Arguments of the op: `x` [T, K]; `weight` [N, K], or if `gated` [2 N, K] with the gate's rows
first; `norm` [K], the weight of an RMSNorm with epsilon `eps`; `residual` [T, N]. All have one
dtype. The result is [T, N]:

    x = norm * (x * rsqrt(mean(x ** 2, -1) + eps))          # if there is a norm
    out = x @ weight.T
    out = silu(out[:, :N]) * out[:, N:]                     # if gated
    out = residual + out                                    # if there is a residual
"""

import torch
import triton
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from passes.ops import cpu
from passes.ops.library import define_op
from passes.ops.pdl import pdl_launch_options
from passes.ops.skinny_linear_kernels import matrix_kernel, vector_kernel

MAX_TOKENS = 32
MAX_TOKENS_GPU = 16
_MAX_VECTOR_TOKENS = 2
_SMALL = 2**23  # elements of a weight; reading more takes longer than a kernel launch


def skinny_linear_reference(
    x_TK: Tensor, weight: Tensor, norm_K: Tensor | None, eps: float, residual_TN: Tensor | None,
    gated: bool,
) -> Tensor:  # fmt: skip
    """Return [T, N] in plain PyTorch, rounded where a model rounds."""
    if norm_K is not None:
        x_float = x_TK.float()
        rms = torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + eps)
        x_TK = norm_K * (x_float * rms).to(x_TK.dtype)
    out = x_TK @ weight.T
    if gated:
        gate, up = out.chunk(2, -1)
        out = F.silu(gate) * up
    return out if residual_TN is None else residual_TN + out


def skinny_linear_kernel(
    x_TK: Tensor, weight: Tensor, norm_K: Tensor | None, eps: float, residual_TN: Tensor | None,
    gated: bool,
) -> Tensor:  # fmt: skip
    """Return [T, N], with Triton; the weight is contiguous.

    A norm's factor is applied after the sum, so results differ from the reference in rounding.
    """
    x_TK = _row_major(x_TK)
    residual_TN = None if residual_TN is None else _row_major(residual_TN)
    T, K = x_TK.shape
    rows = weight.shape[0]
    N = rows // (1 + gated)
    assert weight.is_contiguous()
    out_TN = x_TK.new_empty(T, N)
    residual = out_TN if residual_TN is None else residual_TN
    arguments = (out_TN, x_TK, weight, norm_K, residual, x_TK.stride(0), residual.stride(0), eps)
    if T == 1 or (T <= _MAX_VECTOR_TOKENS and is_small_weight(rows, K)):
        kernel, tiles, num_out = vector_kernel, _vector_tiles(T, N, K, gated), N
    else:
        kernel, tiles, num_out = matrix_kernel, _matrix_tiles(T, rows, K), rows
    kernel[(triton.cdiv(num_out, tiles["TILE_N"]),)](
        *arguments, T=T, N=N, K=K, HAS_NORM=norm_K is not None,
        HAS_RESIDUAL=residual_TN is not None, GATED=gated, **tiles, **pdl_launch_options(),
    )  # fmt: skip
    return out_TN


def is_small_weight(rows: int, K: int) -> bool:
    """Return whether a weight [rows, K] is read faster than a separate norm or gate is launched.

    Norm and gate are then cheaper inside the kernel, although each program repeats the norm.
    """
    return rows * K < _SMALL


def _vector_tiles(T: int, N: int, K: int, gated: bool) -> dict[str, int]:
    """Return the fastest sizes of those tried on an H200 with the layers of 0.6B and 8B models."""
    if is_small_weight(N * (1 + gated), K):
        if N <= K:
            tile_n, tile_k, stages, warps = 8, 2048, 2, 8
        elif gated:
            tile_n, tile_k, stages, warps = 2, 512, 3, 2
        else:
            tile_n, tile_k, stages, warps = (4, 512, 3, 4) if T == 1 else (8, 1024, 2, 4)
    elif gated:
        tile_n, tile_k, stages, warps = 4, 1024, 3, 4
    elif K >= 8192:
        tile_n, tile_k, stages, warps = 4, 1024, 2, 4
    else:
        tile_n, tile_k, stages, warps = (4, 2048, 3, 8) if K >= 2048 else (8, 256, 3, 4)
    sizes = {"TILE_T": T, "TILE_N": tile_n, "TILE_K": tile_k}
    return {**sizes, "STAGES": stages, "num_warps": warps}


def _matrix_tiles(T: int, rows: int, K: int) -> dict[str, int]:
    """Return the fastest sizes of those tried on an H200 with the layers of 0.6B and 8B models.

    FIRST_K is a multiple of TILE_K. A matrix instruction takes 16 input features of each warp and
    8 tokens.
    """
    tile_n, first_k, tile_k, warps = 16, 1024, 512, 4
    if is_small_weight(rows, K):
        if rows > K:
            tile_k = 256
        elif T <= 8 and K <= 2048:
            first_k, warps = 2048, 8
    elif T <= 8:
        first_k, warps = 2048, 8
    else:
        tile_n, first_k = 32, 512
    while first_k > max(16 * warps, K):
        first_k //= 2
    tile_t = max(8, triton.next_power_of_2(T))
    sizes = {"TILE_T": tile_t, "TILE_N": tile_n, "FIRST_K": first_k, "TILE_K": min(tile_k, first_k)}
    return {**sizes, "STAGES": 3, "WARPS": warps, "num_warps": warps}


def _row_major(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if Inductor has laid it out in columns.

    Inductor does so after a convolution, for example.
    """
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def skinny_linear_cpu(
    x_TK: Tensor, weight: Tensor, norm_K: Tensor | None, eps: float, residual_TN: Tensor | None,
    gated: bool,
) -> Tensor:  # fmt: skip
    """Return [T, N], with C++ for float32 and by the reference for other dtypes."""
    x_TK = _row_major(x_TK)
    residual_TN = None if residual_TN is None else _row_major(residual_TN)
    if x_TK.dtype != torch.float32:
        return skinny_linear_reference(x_TK, weight, norm_K, eps, residual_TN, gated)
    return cpu.skinny_linear(x_TK, weight, norm_K, eps, residual_TN, gated)


def _skinny_linear_fake(
    x_TK: Tensor, weight: Tensor, norm_K: Tensor | None, eps: float, residual_TN: Tensor | None,
    gated: bool,
) -> Tensor:  # fmt: skip
    return x_TK.new_empty(x_TK.shape[0], weight.shape[0] // (1 + gated))


skinny_linear = define_op(
    "skinny_linear(Tensor x, Tensor weight, Tensor? norm, float eps, Tensor? residual, "
    "bool gated) -> Tensor",
    reference=skinny_linear_reference,
    kernel=skinny_linear_kernel,
    fake=_skinny_linear_fake,
    cpu=skinny_linear_cpu,
)
