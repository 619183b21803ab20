"""A linear layer over few tokens, with what stands before and after it.

Where few tokens meet a large weight, the time is that of reading the weight; so one kernel reads it once and does the rest
on the way: the root mean square norm of its input, the gate of a gated feed-forward layer, the addition to a residual. Launched
early (programmatic dependent launch), it fetches weights while the kernel before it still runs.

One or two tokens are multiplied number by number (`_vector_kernel`), more of them by matrix instructions (`_matrix_kernel`), whose
rows are features, so that eight tokens fill a tile. Both have the norm's factor, equal for all features in, come after the sum.

Shapes: T tokens, K features in, N features out; a gated weight is [2 N, K], the gate's rows first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from passes.ops import cpu
from passes.ops.library import define_op
from passes.ops.pdl import pdl_launch_options

MAX_TOKENS = 32
MAX_TOKENS_GPU = 16
_MAX_VECTOR_TOKENS = 2
_SMALL = 2**23  # elements of a weight; a larger one takes longer to read than to launch


def skinny_linear_reference(
    x_TK: Tensor,
    weight: Tensor,
    norm_K: Tensor | None,
    eps: float,
    residual_TN: Tensor | None,
    gated: bool,
) -> Tensor:
    """Plain PyTorch, rounding where a model would."""
    if norm_K is not None:
        wide = x_TK.float()
        x_TK = norm_K * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(
            x_TK.dtype
        )
    out = x_TK @ weight.T
    if gated:
        gate, up = out.chunk(2, -1)
        out = F.silu(gate) * up
    return out if residual_TN is None else residual_TN + out


@triton.jit
def _finished(total, residual, live, dtype: tl.constexpr, HAS_RESIDUAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums, rounded, and added to what the residual points to."""
    result = total.to(dtype)
    if HAS_RESIDUAL:
        added = tl.load(residual, mask=live, other=0.0)
        result = (added.to(tl.float32) + result.to(tl.float32)).to(dtype)
    return result


@triton.jit
def _gated(gate, up):  # type: ignore[no-untyped-def]
    """silu(gate) * up, rounded where a model would round."""
    wide = gate.to(tl.float32)
    return ((wide * tl.sigmoid(wide)).to(gate.dtype).to(tl.float32) * up.to(tl.float32)).to(
        gate.dtype
    )


@triton.jit
def _vector_kernel(  # type: ignore[no-untyped-def]
    out, x, weight, norm, residual, x_stride, residual_stride, eps,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    USE_PDL: tl.constexpr, TILE_T: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: TILE_N features of all tokens. Its tiles are [TILE_T, TILE_N, TILE_K], or broadcast to that."""
    EVEN: tl.constexpr = N % TILE_N == 0 and K % TILE_K == 0
    t = tl.arange(0, TILE_T)
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, TILE_K)[None, None, :]
    row = weight + n[None, :, None].to(tl.int64) * K
    x += t[:, None, None] * x_stride
    n_live = (n[None, :, None] < N) | EVEN
    t_live = (t[:, None, None] < T) | (TILE_T == T)
    live = (k < K) | EVEN
    w = tl.load(row + k, mask=n_live & live, other=0.0)
    if GATED:
        w_up = tl.load(row + N * K + k, mask=n_live & live, other=0.0)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    values = tl.load(x + k, mask=t_live & live, other=0.0).to(tl.float32)
    squares = values * values
    if HAS_NORM:
        values *= tl.load(norm + k, mask=live, other=0.0).to(tl.float32)
    acc = w.to(tl.float32) * values
    acc_up = acc
    if GATED:
        acc_up = w_up.to(tl.float32) * values
    for base in tl.range(TILE_K, K, TILE_K, num_stages=STAGES):
        k = base + tl.arange(0, TILE_K)[None, None, :]
        live = (k < K) | EVEN
        values = tl.load(x + k, mask=t_live & live, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += values * values
            values *= tl.load(norm + k, mask=live, other=0.0).to(tl.float32)
        acc += tl.load(row + k, mask=n_live & live, other=0.0).to(tl.float32) * values
        if GATED:
            acc_up += (
                tl.load(row + N * K + k, mask=n_live & live, other=0.0).to(tl.float32) * values
            )
    total = tl.sum(acc, 2)
    factor = 1.0
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(squares, 2) / K + eps)
        total *= factor
    dtype: tl.constexpr = out.dtype.element_ty
    live = (t[:, None] < T) & (n[None, :] < N)
    if GATED:
        total = _gated(total.to(dtype), (tl.sum(acc_up, 2) * factor).to(dtype))
    result = _finished(
        total, residual + t[:, None] * residual_stride + n[None, :], live, dtype, HAS_RESIDUAL
    )
    tl.store(out + t[:, None] * N + n[None, :], result, mask=live)


@triton.jit
def _features_in(base, WARPS: tl.constexpr, TILE_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a tile that begins at base, the features of each warp's share: [WARPS, TILE_K / WARPS]."""
    return (
        base
        + tl.arange(0, WARPS)[:, None] * (TILE_K // WARPS)
        + tl.arange(0, TILE_K // WARPS)[None, :]
    )


@triton.jit
def _weights(rows, k_WK, n_live, K: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    if EVEN:
        return tl.load(rows + k_WK[:, None, :])
    return tl.load(rows + k_WK[:, None, :], mask=n_live & (k_WK[:, None, :] < K), other=0.0)


@triton.jit
def _tokens(x, norm, k_WK, t_live, K: tl.constexpr, HAS_NORM: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tokens, times the norm's weight, as [WARPS, TILE_K / WARPS, TILE_T]; and the sums of their squares, [TILE_T]."""
    x_WKT = tl.load(x + k_WK[:, :, None], mask=t_live & ((k_WK[:, :, None] < K) | EVEN), other=0.0)
    squares = tl.zeros([x_WKT.shape[2]], tl.float32)
    if HAS_NORM:
        wide = x_WKT.to(tl.float32)
        squares = tl.sum(tl.sum(wide * wide, 1), 0)
        norm_WK = tl.load(norm + k_WK, mask=(k_WK < K) | EVEN, other=0.0).to(tl.float32)
        x_WKT = (wide * norm_WK[:, :, None]).to(x_WKT.dtype)
    return x_WKT, squares


@triton.jit
def _matrix_kernel(  # type: ignore[no-untyped-def]
    out, x, weight, norm, residual, x_stride, residual_stride, eps,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    USE_PDL: tl.constexpr, WARPS: tl.constexpr, TILE_T: tl.constexpr, TILE_N: tl.constexpr, FIRST_K: tl.constexpr,
    TILE_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: TILE_N rows of the weight for all tokens; the first FIRST_K features are fetched while the kernel before runs.

    Each warp sums over a part of every tile of its own, so that no chain of matrix instructions is long. Where there is a gate,
    a row of it and a row of what it gates take turns.
    """
    ROWS: tl.constexpr = N * (1 + GATED)
    EVEN: tl.constexpr = ROWS % TILE_N == 0 and K >= FIRST_K and K % TILE_K == 0
    t = tl.arange(0, TILE_T)
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    row = (n % 2) * N + n // 2 if GATED else n
    rows = weight + row[None, :, None].to(tl.int64) * K
    x += t[None, None, :] * x_stride
    t_live = t[None, None, :] < T
    n_live = n[None, :, None] < ROWS
    k_first = _features_in(0, WARPS, FIRST_K)
    w_first = _weights(rows, k_first, n_live, K, EVEN)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    x_first, squares = _tokens(x, norm, k_first, t_live, K, HAS_NORM, EVEN)
    acc = tl.dot(w_first, x_first, input_precision="ieee")
    for base in tl.range(FIRST_K, K, TILE_K, num_stages=STAGES):
        k_WK = _features_in(base, WARPS, TILE_K)
        w_WNK = _weights(rows, k_WK, n_live, K, EVEN)
        x_WKT, more = _tokens(x, norm, k_WK, t_live, K, HAS_NORM, EVEN)
        squares += more
        acc = tl.dot(w_WNK, x_WKT, acc, input_precision="ieee")
    total = tl.sum(acc, 0)
    if HAS_NORM:
        total *= tl.rsqrt(squares / K + eps)[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    if GATED:
        gate, up = tl.split(
            tl.permute(tl.reshape(total.to(dtype), [TILE_N // 2, 2, TILE_T]), 0, 2, 1)
        )
        total = _gated(gate, up)
        n = tl.program_id(0) * (TILE_N // 2) + tl.arange(0, TILE_N // 2)
    live = (t[None, :] < T) & (n[:, None] < N)
    result = _finished(
        total, residual + t[None, :] * residual_stride + n[:, None], live, dtype, HAS_RESIDUAL
    )
    tl.store(out + t[None, :] * N + n[:, None], result, mask=live)


def skinny_linear_kernel(
    x_TK: Tensor,
    weight: Tensor,
    norm_K: Tensor | None,
    eps: float,
    residual_TN: Tensor | None,
    gated: bool,
) -> Tensor:
    """Triton. The whole weight is contiguous."""
    x_TK, residual_TN = _in_rows(x_TK), None if residual_TN is None else _in_rows(residual_TN)
    T, K = x_TK.shape
    rows = weight.shape[0]
    N = rows // (1 + gated)
    assert weight.is_contiguous()
    out_TN = x_TK.new_empty(T, N)
    flags = {
        "HAS_NORM": norm_K is not None,
        "HAS_RESIDUAL": residual_TN is not None,
        "GATED": gated,
        **pdl_launch_options(),
    }
    residual = out_TN if residual_TN is None else residual_TN
    arguments = (out_TN, x_TK, weight, norm_K, residual, x_TK.stride(0), residual.stride(0), eps)
    if T == 1 or (T <= _MAX_VECTOR_TOKENS and is_small_weight(rows, K)):
        tiles = _vector_tiles(T, N, K, gated)
        _vector_kernel[(triton.cdiv(N, tiles["TILE_N"]),)](
            *arguments, T=T, N=N, K=K, TILE_T=T, **tiles, **flags
        )
    else:
        tiles = _matrix_tiles(T, rows, K)
        _matrix_kernel[(triton.cdiv(rows, tiles["TILE_N"]),)](
            *arguments, T=T, N=N, K=K, **tiles, **flags
        )
    return out_TN


def is_small_weight(rows: int, K: int) -> bool:
    """Whether a weight is read so fast that a kernel for the norm alone, or the gate, would cost more than doing it on the way."""
    return rows * K < _SMALL


def _vector_tiles(T: int, N: int, K: int, gated: bool) -> dict[str, int]:
    """The fastest of those tried on an H200, for layers of 0.6B and 8B models."""
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
    return {"TILE_N": tile_n, "TILE_K": tile_k, "STAGES": stages, "num_warps": warps}


def _matrix_tiles(T: int, rows: int, K: int) -> dict[str, int]:
    """Likewise; FIRST_K is a multiple of TILE_K, and a matrix instruction takes 16 features of a warp's, of 8 tokens."""
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
    tiles = {
        "TILE_T": max(8, triton.next_power_of_2(T)),
        "TILE_N": tile_n,
        "FIRST_K": first_k,
        "TILE_K": min(tile_k, first_k),
    }
    return {**tiles, "STAGES": 3, "WARPS": warps, "num_warps": warps}


def _in_rows(tensor: Tensor) -> Tensor:
    """Itself, or a copy where the compiler chose to lay it out in columns, as behind a convolution."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def skinny_linear_cpu(
    x_TK: Tensor,
    weight: Tensor,
    norm_K: Tensor | None,
    eps: float,
    residual_TN: Tensor | None,
    gated: bool,
) -> Tensor:
    """C++ in float32, else the reference."""
    x_TK, residual_TN = _in_rows(x_TK), None if residual_TN is None else _in_rows(residual_TN)
    if x_TK.dtype != torch.float32:
        return skinny_linear_reference(x_TK, weight, norm_K, eps, residual_TN, gated)
    return cpu.skinny_linear(x_TK, weight, norm_K, eps, residual_TN, gated)


def _skinny_linear_fake(
    x_TK: Tensor,
    weight: Tensor,
    norm_K: Tensor | None,
    eps: float,
    residual_TN: Tensor | None,
    gated: bool,
) -> Tensor:
    return x_TK.new_empty(x_TK.shape[0], weight.shape[0] // (1 + gated))


skinny_linear = define_op(
    "skinny_linear(Tensor x, Tensor weight, Tensor? norm, float eps, Tensor? residual, bool gated) -> Tensor",
    reference=skinny_linear_reference,
    kernel=skinny_linear_kernel,
    fake=_skinny_linear_fake,
    cpu=skinny_linear_cpu,
)
