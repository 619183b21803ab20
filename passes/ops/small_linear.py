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
    if GATED:  # rounded where a model would round
        gate = result.to(tl.float32)
        up = (tl.sum(acc_up, 1) * factor).to(dtype).to(tl.float32)
        result = ((gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up).to(dtype)
    tl.store(out + n, _add(result, residual + n, n < N, HAS_RESIDUAL), mask=n < N)


@triton.jit
def _few_tokens_kernel(  # type: ignore[no-untyped-def]
    out, x, weight, residual, shares, arrivals, x_stride, residual_stride,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EARLY: tl.constexpr,
    SPLITS: tl.constexpr, TILE_T: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: TILE_N features of all tokens, over one of SPLITS shares of K; the last to arrive adds the shares, in order."""
    t = tl.arange(0, TILE_T)
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    split = tl.program_id(1)
    EVEN: tl.constexpr = N % TILE_N == 0 and K % (TILE_K * SPLITS) == 0
    SHARE: tl.constexpr = tl.cdiv(tl.cdiv(K, TILE_K), SPLITS) * TILE_K
    acc = tl.zeros([TILE_T, TILE_N], tl.float32)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    for base in tl.range(split * SHARE, split * SHARE + SHARE, TILE_K, num_stages=STAGES):
        k = base + tl.arange(0, TILE_K)
        x_live = t[:, None] < T
        w_live = None
        if not EVEN:
            x_live = x_live & (k[None, :] < K)
            w_live = (n[None, :] < N) & (k[:, None] < K)
        x_TK = tl.load(x + t[:, None] * x_stride + k[None, :], mask=x_live, other=0.0)
        w_KN = tl.load(weight + n[None, :].to(tl.int64) * K + k[:, None], mask=w_live, other=None if EVEN else 0.0)
        acc = tl.dot(x_TK, w_KN, acc, input_precision="ieee")
    live = (t[:, None] < T) & (n[None, :] < N)
    if SPLITS > 1:
        tl.store(shares + (split * T + t[:, None]) * N + n[None, :], acc, mask=live)
        tl.debug_barrier()  # every thread's share is written before one of them says so
        if tl.atomic_add(arrivals + tl.program_id(0), 1, sem="acq_rel") != SPLITS - 1:
            return
        tl.store(arrivals + tl.program_id(0), 0)  # as it was found, for the next launch
        acc = tl.zeros([TILE_T, TILE_N], tl.float32)
        for other in tl.static_range(SPLITS):
            acc += tl.load(shares + (other * T + t[:, None]) * N + n[None, :], mask=live, other=0.0, cache_modifier=".cg")
    kept = residual + t[:, None] * residual_stride + n[None, :]
    result = _add(acc.to(out.dtype.element_ty), kept, live, HAS_RESIDUAL)
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
    assert norm_K is None, "the norm is for one token alone"
    assert not gated, "the gate is for one token alone"
    tile_n, splits, stages = _few_tokens_tiles(N, K)
    shares = x_TK.new_empty(splits, T, N, dtype=torch.float32) if splits > 1 else None
    _few_tokens_kernel[(triton.cdiv(N, tile_n), splits)](
        out_TN, x_TK, weight, residual, shares, arrivals, x_TK.stride(0), residual.stride(0),
        T=T, N=N, K=K, SPLITS=splits, TILE_T=max(16, triton.next_power_of_2(T)), TILE_N=tile_n,
        TILE_K=128 if x_TK.dtype.itemsize == 2 else 32, STAGES=stages, num_warps=4, **flags,
    )  # fmt: skip
    return out_TN


def _one_token_tiles(N: int, K: int, gated: bool) -> tuple[int, int, int, int]:
    """Rows and columns of a tile, stages, warps: the fastest of those tried on an H200, for layers of 0.6B and 8B models."""
    if K * N < 2**23:
        return (2, 1024, 2, 4) if K <= 1024 else (4, 1024, 3, 8)
    if K >= 8192:
        return 4, 1024, 2, 4
    return (16, 256, 2, 4) if gated else (8, 256, 3, 4)


def _few_tokens_tiles(N: int, K: int) -> tuple[int, int, int]:
    """Features of a tile, shares of K, stages: likewise."""
    if N >= 2**14:
        return 64, 1, 4
    programs = triton.cdiv(N, 32)
    splits = 4 if programs <= 64 else 2 if programs <= 256 else 1
    return 32, splits, 6 if N * K >= 2**23 else 4


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
