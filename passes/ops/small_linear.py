"""A linear layer over few tokens, with what stands before and after it.

Where few tokens meet a large weight, the time is that of reading the weight; so one kernel reads it once and does the rest
on the way: the addition to a residual and, for a single token, the root mean square norm of its input and the gate of a gated
feed-forward layer. Launched early (programmatic dependent launch), it fetches weights while the kernel before it still runs.

Shapes: T tokens, K features in, N features out; a gated weight is [2 N, K], the gate's rows first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from passes.early_launch import early_launch
from passes.ops import cpu
from passes.ops.library import define

MAX_TOKENS = 32


def small_linear_reference(
    x_TK: Tensor, weight: Tensor, arrivals: Tensor, norm_K: Tensor | None, eps: float, residual_TN: Tensor | None, gated: bool
) -> Tensor:
    """Plain PyTorch, rounding where a model would."""
    if norm_K is not None:
        wide = x_TK.float()
        x_TK = norm_K * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x_TK.dtype)
    out = x_TK @ weight.T
    if gated:
        gate, up = out.chunk(2, -1)
        out = F.silu(gate) * up
    return out if residual_TN is None else residual_TN + out


@triton.jit
def _add(result, residual, mask, HAS_RESIDUAL: tl.constexpr):  # type: ignore[no-untyped-def]
    if HAS_RESIDUAL:
        kept = tl.load(residual, mask=mask, other=0.0)
        result = (kept.to(tl.float32) + result.to(tl.float32)).to(result.dtype)
    return result


@triton.jit
def _gated(gate, up):  # type: ignore[no-untyped-def]
    """silu(gate) * up, rounded where a model would round."""
    wide = gate.to(tl.float32)
    return ((wide * tl.sigmoid(wide)).to(gate.dtype).to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def _one_token_kernel(  # type: ignore[no-untyped-def]
    out, x, weight, norm, residual, eps,
    N: tl.constexpr, K: tl.constexpr, HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    EARLY: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: TILE_N features of the only token. The norm's factor, equal for all features in, comes after the sum."""
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, TILE_K)
    row = weight + n[:, None].to(tl.int64) * K
    n_live = n[:, None] < N
    first = tl.load(row + k[None, :], mask=n_live & (k[None, :] < K), other=0.0)
    if GATED:
        first_up = tl.load(row + N * K + k[None, :], mask=n_live & (k[None, :] < K), other=0.0)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    x_K = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    squares = x_K * x_K
    if HAS_NORM:
        x_K *= tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
    acc = first.to(tl.float32) * x_K[None, :]
    acc_up = acc
    if GATED:
        acc_up = first_up.to(tl.float32) * x_K[None, :]
    for base in tl.range(TILE_K, K, TILE_K, num_stages=STAGES):
        k = base + tl.arange(0, TILE_K)
        x_K = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += x_K * x_K
            x_K *= tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
        live = n_live & (k[None, :] < K)
        acc += tl.load(row + k[None, :], mask=live, other=0.0).to(tl.float32) * x_K[None, :]
        if GATED:
            acc_up += tl.load(row + N * K + k[None, :], mask=live, other=0.0).to(tl.float32) * x_K[None, :]
    factor = 1.0
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(squares) / K + eps)
    dtype: tl.constexpr = out.dtype.element_ty
    result = (tl.sum(acc, 1) * factor).to(dtype)
    if GATED:
        result = _gated(result, (tl.sum(acc_up, 1) * factor).to(dtype))
    tl.store(out + n, _add(result, residual + n, n < N, HAS_RESIDUAL), mask=n < N)


@triton.jit
def _features_in(base, WARPS: tl.constexpr, TILE_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a tile that begins at base, the features of each warp's share: [WARPS, TILE_K / WARPS]."""
    return base + tl.arange(0, WARPS)[:, None] * (TILE_K // WARPS) + tl.arange(0, TILE_K // WARPS)[None, :]


@triton.jit
def _weights(rows, k_WK, n_live, K: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    if EVEN:
        return tl.load(rows + k_WK[:, :, None])
    return tl.load(rows + k_WK[:, :, None], mask=n_live & (k_WK[:, :, None] < K), other=0.0)


@triton.jit
def _tokens(x, norm, k_WK, t_live, K: tl.constexpr, HAS_NORM: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tokens, times the norm's weight, as [WARPS, TILE_T, TILE_K / WARPS]; and the sums of their squares, [TILE_T]."""
    x_WTK = tl.load(x + k_WK[:, None, :], mask=t_live & ((k_WK[:, None, :] < K) | EVEN), other=0.0)
    squares = tl.zeros([x_WTK.shape[1]], tl.float32)
    if HAS_NORM:
        wide = x_WTK.to(tl.float32)
        squares = tl.sum(tl.sum(wide * wide, 2), 0)
        norm_WK = tl.load(norm + k_WK, mask=(k_WK < K) | EVEN, other=0.0).to(tl.float32)
        x_WTK = (wide * norm_WK[:, None, :]).to(x_WTK.dtype)
    return x_WTK, squares


@triton.jit
def _few_tokens_kernel(  # type: ignore[no-untyped-def]
    out, x, weight, norm, residual, shares, arrivals, x_stride, residual_stride, eps,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    EARLY: tl.constexpr, SPLITS: tl.constexpr, WARPS: tl.constexpr, TILE_T: tl.constexpr, TILE_N: tl.constexpr,
    FIRST_K: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: TILE_N rows of the weight for all tokens, over one of SPLITS shares of K; the last to arrive adds the shares.

    Each warp sums over a part of every tile of its own, so that no chain of matrix instructions is long. Where there is a gate,
    a row of it and a row of what it gates take turns.
    """
    ROWS: tl.constexpr = N * (1 + GATED)
    SHARE: tl.constexpr = (K + TILE_K * SPLITS - 1) // (TILE_K * SPLITS) * TILE_K
    EVEN: tl.constexpr = ROWS % TILE_N == 0 and SHARE * SPLITS == K
    t = tl.arange(0, TILE_T)
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    row = (n % 2) * N + n // 2 if GATED else n
    begin = tl.program_id(1) * SHARE
    rows = weight + row[None, None, :].to(tl.int64) * K
    x += t[None, :, None] * x_stride
    t_live = t[None, :, None] < T
    n_live = n[None, None, :] < ROWS
    k_first = _features_in(begin, WARPS, FIRST_K)
    w_first = _weights(rows, k_first, n_live, K, EVEN)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    x_first, squares = _tokens(x, norm, k_first, t_live, K, HAS_NORM, EVEN)
    acc = tl.dot(x_first, w_first, input_precision="ieee")
    for base in tl.range(begin + FIRST_K, begin + SHARE, TILE_K, num_stages=STAGES):
        k_WK = _features_in(base, WARPS, TILE_K)
        w_WKN = _weights(rows, k_WK, n_live, K, EVEN)
        x_WTK, more = _tokens(x, norm, k_WK, t_live, K, HAS_NORM, EVEN)
        squares += more
        acc = tl.dot(x_WTK, w_WKN, acc, input_precision="ieee")
    total = tl.sum(acc, 0)
    live = (t[:, None] < T) & (n[None, :] < ROWS)
    if SPLITS > 1:
        share = shares + t[:, None] * ROWS + n[None, :]
        tl.store(share + tl.program_id(1) * (T * ROWS), total, mask=live)
        tl.debug_barrier()  # every thread's share is written before one of them says so
        if tl.atomic_add(arrivals + tl.program_id(0), 1, sem="acq_rel") != SPLITS - 1:
            return
        tl.store(arrivals + tl.program_id(0), 0)  # as it was found, for the next launch
        total = tl.zeros([TILE_T, TILE_N], tl.float32)
        for other in tl.static_range(SPLITS):
            total += tl.load(share + other * (T * ROWS), mask=live, other=0.0, cache_modifier=".cg")
    if HAS_NORM:
        total *= tl.rsqrt(squares / K + eps)[:, None]
    dtype: tl.constexpr = out.dtype.element_ty
    result = total.to(dtype)
    if GATED:
        gate, up = tl.split(tl.reshape(result, [TILE_T, TILE_N // 2, 2]))
        result = _gated(gate, up)
        n = tl.program_id(0) * (TILE_N // 2) + tl.arange(0, TILE_N // 2)
    live = (t[:, None] < T) & (n[None, :] < N)
    result = _add(result, residual + t[:, None] * residual_stride + n[None, :], live, HAS_RESIDUAL)
    tl.store(out + t[:, None] * N + n[None, :], result, mask=live)


def small_linear_kernel(
    x_TK: Tensor, weight: Tensor, arrivals: Tensor, norm_K: Tensor | None, eps: float, residual_TN: Tensor | None, gated: bool
) -> Tensor:
    """Triton. The last dim of x and residual and the whole weight are contiguous; `arrivals` are zeros before and after."""
    T, K = x_TK.shape
    N = weight.shape[0] // (1 + gated)
    assert x_TK.stride(1) == 1
    assert weight.is_contiguous()
    assert residual_TN is None or residual_TN.stride(1) == 1
    out_TN = x_TK.new_empty(T, N)
    flags = {"HAS_RESIDUAL": residual_TN is not None, **early_launch()}
    residual = out_TN if residual_TN is None else residual_TN
    if T == 1:
        tile_n, tile_k, stages, num_warps = _one_token_tiles(N, K, gated)
        _one_token_kernel[(triton.cdiv(N, tile_n),)](
            out_TN, x_TK, weight, norm_K, residual, eps,
            N=N, K=K, HAS_NORM=norm_K is not None, GATED=gated, TILE_N=tile_n, TILE_K=tile_k, STAGES=stages,
            num_warps=num_warps, **flags,
        )  # fmt: skip
        return out_TN
    tiles = _few_tokens_tiles(weight.shape[0], K, T)
    splits = tiles.pop("SPLITS")
    assert splits == 1 or norm_K is None, "each program of a norm reads whole tokens"
    shares = x_TK.new_empty(splits, T, weight.shape[0], dtype=torch.float32) if splits > 1 else None
    _few_tokens_kernel[(triton.cdiv(weight.shape[0], tiles["TILE_N"]), splits)](
        out_TN, x_TK, weight, norm_K, residual, shares, arrivals, x_TK.stride(0), residual.stride(0), eps,
        T=T, N=N, K=K, HAS_NORM=norm_K is not None, GATED=gated, SPLITS=splits, TILE_T=max(16, triton.next_power_of_2(T)),
        num_warps=tiles["WARPS"], **tiles, **flags,
    )  # fmt: skip
    return out_TN


def _one_token_tiles(N: int, K: int, gated: bool) -> tuple[int, int, int, int]:
    """Rows and columns of a tile, stages, warps: the fastest of those tried on an H200, for layers of 0.6B and 8B models."""
    if K * N < 2**23:
        return (2, 1024, 2, 4) if K <= 1024 else (4, 1024, 3, 8)
    if K >= 8192:
        return 4, 1024, 2, 4
    return (16, 256, 2, 4) if gated else (8, 256, 3, 4)


def _few_tokens_tiles(rows: int, K: int, T: int) -> dict[str, int]:
    """Likewise. The first FIRST_K features of a share are fetched while the kernel before still runs."""
    splits, warps, stages, tile_k = 1, 4, 4, 256
    if rows * K < 2**23:
        tile_n, first_k = (32, 1024) if rows >= 2**12 else (8, 2048 if K >= 2048 else 1024)
        if rows < 2**12:
            warps = 8
        if T > 16:
            first_k = min(first_k, 512)
    elif rows <= K:
        tile_n, first_k, splits = 32, 256, 4 if rows <= 2**11 else 2
    else:
        tile_n, first_k = (64, 256) if rows >= 2**14 else (16, 512)
    share = triton.cdiv(K, splits)
    while first_k > max(16 * warps, share):  # a matrix instruction takes 16 features
        first_k //= 2
    tile_k = min(tile_k, first_k)
    return {"SPLITS": splits, "WARPS": warps, "TILE_N": tile_n, "FIRST_K": first_k, "TILE_K": tile_k, "STAGES": stages}


def small_linear_cpu(
    x_TK: Tensor, weight: Tensor, arrivals: Tensor, norm_K: Tensor | None, eps: float, residual_TN: Tensor | None, gated: bool
) -> Tensor:
    """C++ in float32, else the reference."""
    if x_TK.dtype != torch.float32:
        return small_linear_reference(x_TK, weight, arrivals, norm_K, eps, residual_TN, gated)
    return cpu.small_linear(x_TK, weight, norm_K, eps, residual_TN, gated)


def _small_linear_fake(
    x_TK: Tensor, weight: Tensor, arrivals: Tensor, norm_K: Tensor | None, eps: float, residual_TN: Tensor | None, gated: bool
) -> Tensor:
    return x_TK.new_empty(x_TK.shape[0], weight.shape[0] // (1 + gated))


small_linear = define(
    "small_linear(Tensor x, Tensor weight, Tensor arrivals, Tensor? norm, float eps, Tensor? residual, bool gated) -> Tensor",
    reference=small_linear_reference,
    kernel=small_linear_kernel,
    fake=_small_linear_fake,
    cpu=small_linear_cpu,
)
