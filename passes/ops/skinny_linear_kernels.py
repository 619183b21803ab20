"""Triton kernels of a linear layer over few tokens; see `passes.ops.skinny_linear`.

`vector_kernel` multiplies element by element and serves one or two tokens. `matrix_kernel` uses
matrix instructions, whose rows are output features, so that eight tokens fill a tile. In both, the
factor of an RMSNorm, which is equal for all input features, is applied after the sum.

Shape suffixes:
    T: tokens
    N: output features
    K: input features
    W: warps; each sums over its share of a tile's input features
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _round_and_add(  # type: ignore[no-untyped-def]
    sums, residual, mask, dtype: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):
    """Return the sums rounded to `dtype`, plus the values at the pointers `residual`."""
    result = sums.to(dtype)
    if HAS_RESIDUAL:
        added = tl.load(residual, mask=mask, other=0.0)
        result = (added.to(tl.float32) + result.to(tl.float32)).to(dtype)
    return result


@triton.jit
def _silu_and_mul(gate, up):  # type: ignore[no-untyped-def]
    """Return silu(gate) * up, rounded where a model rounds."""
    gate_float = gate.to(tl.float32)
    activated = (gate_float * tl.sigmoid(gate_float)).to(gate.dtype)
    return (activated.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def vector_kernel(  # type: ignore[no-untyped-def]
    out, x, weight, norm, residual, x_stride, residual_stride, eps,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr, USE_PDL: tl.constexpr,
    TILE_T: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute TILE_N features of all tokens; tiles broadcast to [TILE_T, TILE_N, TILE_K]."""
    EVEN: tl.constexpr = N % TILE_N == 0 and K % TILE_K == 0
    t = tl.arange(0, TILE_T)
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, TILE_K)[None, None, :]
    row = weight + n[None, :, None].to(tl.int64) * K
    x += t[:, None, None] * x_stride
    n_mask = (n[None, :, None] < N) | EVEN
    t_mask = (t[:, None, None] < T) | (TILE_T == T)
    k_mask = (k < K) | EVEN

    # The first tile; its weights are loaded while the preceding kernel runs.
    w = tl.load(row + k, mask=n_mask & k_mask, other=0.0)
    if GATED:
        w_up = tl.load(row + N * K + k, mask=n_mask & k_mask, other=0.0)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    values = tl.load(x + k, mask=t_mask & k_mask, other=0.0).to(tl.float32)
    squares = values * values
    if HAS_NORM:
        values *= tl.load(norm + k, mask=k_mask, other=0.0).to(tl.float32)
    acc = w.to(tl.float32) * values
    acc_up = acc
    if GATED:
        acc_up = w_up.to(tl.float32) * values

    # The other tiles.
    for base in tl.range(TILE_K, K, TILE_K, num_stages=STAGES):
        k = base + tl.arange(0, TILE_K)[None, None, :]
        k_mask = (k < K) | EVEN
        values = tl.load(x + k, mask=t_mask & k_mask, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += values * values
            values *= tl.load(norm + k, mask=k_mask, other=0.0).to(tl.float32)
        acc += tl.load(row + k, mask=n_mask & k_mask, other=0.0).to(tl.float32) * values
        if GATED:
            up = tl.load(row + N * K + k, mask=n_mask & k_mask, other=0.0)
            acc_up += up.to(tl.float32) * values

    # Sum, normalize, gate, add.
    sums = tl.sum(acc, 2)
    factor = 1.0
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(squares, 2) / K + eps)
        sums *= factor
    dtype: tl.constexpr = out.dtype.element_ty
    mask = (t[:, None] < T) & (n[None, :] < N)
    if GATED:
        sums = _silu_and_mul(sums.to(dtype), (tl.sum(acc_up, 2) * factor).to(dtype))
    residual = residual + t[:, None] * residual_stride + n[None, :]
    result = _round_and_add(sums, residual, mask, dtype, HAS_RESIDUAL)
    tl.store(out + t[:, None] * N + n[None, :], result, mask=mask)


@triton.jit
def _features_in(base, WARPS: tl.constexpr, TILE_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return each warp's share [W, TILE_K / W] of the input features from `base` on."""
    warp = tl.arange(0, WARPS)[:, None]
    return base + warp * (TILE_K // WARPS) + tl.arange(0, TILE_K // WARPS)[None, :]


@triton.jit
def _load_weights(  # type: ignore[no-untyped-def]
    rows, k_WK, n_mask, K: tl.constexpr, EVEN: tl.constexpr
):
    if EVEN:
        return tl.load(rows + k_WK[:, None, :])
    return tl.load(rows + k_WK[:, None, :], mask=n_mask & (k_WK[:, None, :] < K), other=0.0)


@triton.jit
def _load_tokens(  # type: ignore[no-untyped-def]
    x, norm, k_WK, t_mask, K: tl.constexpr, HAS_NORM: tl.constexpr, EVEN: tl.constexpr
):
    """Return tokens [W, TILE_K / W, TILE_T] times the norm's weight, and sums of their squares.

    The sums are [TILE_T] and zeros without a norm.
    """
    x_WKT = tl.load(x + k_WK[:, :, None], mask=t_mask & ((k_WK[:, :, None] < K) | EVEN), other=0.0)
    squares = tl.zeros([x_WKT.shape[2]], tl.float32)
    if HAS_NORM:
        x_float = x_WKT.to(tl.float32)
        squares = tl.sum(tl.sum(x_float * x_float, 1), 0)
        norm_WK = tl.load(norm + k_WK, mask=(k_WK < K) | EVEN, other=0.0).to(tl.float32)
        x_WKT = (x_float * norm_WK[:, :, None]).to(x_WKT.dtype)
    return x_WKT, squares


@triton.jit
def matrix_kernel(  # type: ignore[no-untyped-def]
    out, x, weight, norm, residual, x_stride, residual_stride, eps,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr, USE_PDL: tl.constexpr,
    WARPS: tl.constexpr, TILE_T: tl.constexpr, TILE_N: tl.constexpr, FIRST_K: tl.constexpr,
    TILE_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute TILE_N rows of the weight for all tokens.

    Each warp sums over its own part of every tile, which keeps chains of matrix instructions
    short. With a gate, its rows and those of the up projection alternate in a tile.
    """
    ROWS: tl.constexpr = N * (1 + GATED)
    EVEN: tl.constexpr = ROWS % TILE_N == 0 and K >= FIRST_K and K % TILE_K == 0
    t = tl.arange(0, TILE_T)
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    row = (n % 2) * N + n // 2 if GATED else n
    rows = weight + row[None, :, None].to(tl.int64) * K
    x += t[None, None, :] * x_stride
    t_mask = t[None, None, :] < T
    n_mask = n[None, :, None] < ROWS

    # The first FIRST_K features; their weights are loaded while the preceding kernel runs.
    k_first = _features_in(0, WARPS, FIRST_K)
    w_first = _load_weights(rows, k_first, n_mask, K, EVEN)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    x_first, squares = _load_tokens(x, norm, k_first, t_mask, K, HAS_NORM, EVEN)
    acc = tl.dot(w_first, x_first, input_precision="ieee")

    # The other tiles.
    for base in tl.range(FIRST_K, K, TILE_K, num_stages=STAGES):
        k_WK = _features_in(base, WARPS, TILE_K)
        w_WNK = _load_weights(rows, k_WK, n_mask, K, EVEN)
        x_WKT, more = _load_tokens(x, norm, k_WK, t_mask, K, HAS_NORM, EVEN)
        squares += more
        acc = tl.dot(w_WNK, x_WKT, acc, input_precision="ieee")

    # Sum over warps, normalize, gate, add.
    sums = tl.sum(acc, 0)
    if HAS_NORM:
        sums *= tl.rsqrt(squares / K + eps)[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    if GATED:
        pairs = tl.reshape(sums.to(dtype), [TILE_N // 2, 2, TILE_T])
        gate, up = tl.split(tl.permute(pairs, 0, 2, 1))
        sums = _silu_and_mul(gate, up)
        n = tl.program_id(0) * (TILE_N // 2) + tl.arange(0, TILE_N // 2)
    mask = (t[None, :] < T) & (n[:, None] < N)
    residual = residual + t[None, :] * residual_stride + n[:, None]
    result = _round_and_add(sums, residual, mask, dtype, HAS_RESIDUAL)
    tl.store(out + t[None, :] * N + n[:, None], result, mask=mask)
