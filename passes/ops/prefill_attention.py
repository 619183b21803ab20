"""The Triton kernel of paged attention where sequences bring several queries.

It computes softmax online, one tile of keys at a time (FlashAttention-2, arXiv:2307.08691), over pages found through the table
(PagedAttention, arXiv:2309.06180); the query heads that share a key head fill one tile of rows.

Shapes as in `paged_attention`, which see.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _attend_tile(  # type: ignore[no-untyped-def]
    peak, total, acc, q_MD, base, k_cache, v_cache, pages, group, position, oldest, length, scale, softcap, slope,
    G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr, MASKED: tl.constexpr, TILE_K: tl.constexpr, TILE_D: tl.constexpr, TILE_E: tl.constexpr,
):  # fmt: skip
    """Softmax's running peak, total and weighted sum with one more tile of keys; without a mask, every row sees all of them."""
    key = base + tl.arange(0, TILE_K)
    d = tl.arange(0, TILE_D)
    e = tl.arange(0, TILE_E)
    cached = (key >= oldest) & (key < length)
    page = tl.load(
        pages + key // PAGE, mask=cached if MASKED else None, other=0 if MASKED else None
    ).to(tl.int64)
    slot = (page * PAGE + key % PAGE) * G + group
    place_k = k_cache + slot[None, :] * D + d[:, None]
    place_v = v_cache + slot[:, None] * E + e[None, :]
    if MASKED or TILE_D != D or TILE_E != E:
        k_DK = tl.load(place_k, mask=cached[None, :] & (d[:, None] < D), other=0.0)
        v_KE = tl.load(place_v, mask=cached[:, None] & (e[None, :] < E), other=0.0)
    else:
        k_DK = tl.load(place_k)
        v_KE = tl.load(place_v)
    scores = tl.dot(q_MD, k_DK, input_precision="ieee")
    if HAS_SOFTCAP:  # softcap * tanh(scores * scale / softcap)
        scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * (scores * scale) / softcap)) - 1.0)
        scale = 1.0
    scale *= 1.4426950408889634  # exp2 of what is scaled so is exp of it
    if HAS_SLOPES:
        scores = scores * scale + slope[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
        scale = 1.0
    if MASKED:
        seen = cached[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        if WINDOW < 0:
            seen = seen & (key[None, :] >= position[:, None] // -WINDOW * -WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_peak[:, None])  # rounded alike with a mask and without
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    return new_peak, total, tl.dot(weights.to(v_KE.dtype), v_KE, acc, input_precision="ieee")


@triton.jit
def _prefill_attention_kernel(  # type: ignore[no-untyped-def]
    out, q, k_cache, v_cache, block_table, query_start, seq_lens, sinks, slopes, scale, softcap, num_seqs,
    q_stride_t, q_stride_h, q_stride_d, table_stride,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SLOPES: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr, TILE_D: tl.constexpr, TILE_E: tl.constexpr,
    SEARCH_STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: TILE_Q queries of one sequence, with all the query heads of one key head as the TILE_M rows of a tile."""
    tile = (
        tl.num_programs(0) - 1 - tl.program_id(0)
    )  # the last tile of a sequence has most to do, so it starts first
    group = tl.program_id(1)
    # Sequence s starts at tile `query_start[s] // TILE_Q + s`, which leaves room for its last, partial tile:
    # find the last s whose first tile is not past ours.
    low = 0
    high = num_seqs - 1
    for _ in range(SEARCH_STEPS):
        middle = (low + high + 1) // 2
        before = tl.load(query_start + middle) // TILE_Q + middle <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    seq = low
    first = (tile - (tl.load(query_start + seq) // TILE_Q + seq)) * TILE_Q
    start = tl.load(query_start + seq)
    num_queries = tl.load(query_start + seq + 1) - start
    length = tl.load(seq_lens + seq)
    if first >= num_queries or length == 0:
        return

    GROUP: tl.constexpr = H // G
    rows = tl.arange(0, TILE_M)
    query = first + rows // GROUP
    head = group * GROUP + rows % GROUP
    live = (rows < TILE_Q * GROUP) & (query < num_queries)
    first_position = length - num_queries + first
    position = length - num_queries + query
    d = tl.arange(0, TILE_D)
    e = tl.arange(0, TILE_E)
    token = (start + query).to(tl.int64)
    q_MD = tl.load(
        q + token[:, None] * q_stride_t + head[:, None] * q_stride_h + d[None, :] * q_stride_d,
        mask=live[:, None] & (d[None, :] < D), other=0.0,
    )  # fmt: skip

    if HAS_SINKS:
        peak = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
        total = tl.full([TILE_M], 1.0, tl.float32)
    else:
        peak = tl.full([TILE_M], -1e30, tl.float32)
        total = tl.zeros([TILE_M], tl.float32)
    slope = tl.zeros([TILE_M], tl.float32)
    if HAS_SLOPES:
        slope = tl.load(slopes + head, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
    acc = tl.zeros([TILE_M, TILE_E], tl.float32)
    pages = block_table + seq * table_stride
    # Keys that some row of the tile sees, from the first position's window to the last position; first those that every row sees.
    oldest = 0
    if WINDOW > 0:
        oldest = tl.maximum(first_position - WINDOW + 1, 0)
    if WINDOW < 0:
        oldest = first_position // -WINDOW * -WINDOW
    begin = oldest // TILE_K * TILE_K
    end = tl.minimum(first_position + TILE_Q, length)
    if WINDOW == 0:
        all_see = (first_position + 1) // TILE_K * TILE_K
        for base in tl.range(0, all_see, TILE_K, num_stages=STAGES):
            peak, total, acc = _attend_tile(
                peak, total, acc, q_MD, base, k_cache, v_cache, pages, group, position, oldest, length, scale, softcap, slope,
                G, D, E, PAGE, WINDOW, HAS_SOFTCAP, HAS_SLOPES, False, TILE_K, TILE_D, TILE_E,
            )  # fmt: skip
        begin = all_see
    for base in tl.range(begin, end, TILE_K, num_stages=STAGES):
        peak, total, acc = _attend_tile(
            peak, total, acc, q_MD, base, k_cache, v_cache, pages, group, position, oldest, length, scale, softcap, slope,
            G, D, E, PAGE, WINDOW, HAS_SOFTCAP, HAS_SLOPES, True, TILE_K, TILE_D, TILE_E,
        )  # fmt: skip
    result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(
        out + token[:, None] * (H * E) + head[:, None] * E + e[None, :], result.to(out.dtype.element_ty),
        mask=live[:, None] & (e[None, :] < E),
    )  # fmt: skip


def prefill_attention(
    q_THD: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, block_table_SN: Tensor, query_start: Tensor, seq_lens_S: Tensor,
    sinks_H: Tensor | None, slopes_H: Tensor | None, scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """q may have any strides; head dims up to 256."""
    T, H, D = q_THD.shape
    _, page, G, E = v_cache_PBGE.shape
    assert query_start.is_contiguous()
    assert seq_lens_S.is_contiguous()
    assert block_table_SN.stride(1) == 1
    S = seq_lens_S.shape[0]
    out_THE = q_THD.new_zeros(T, H, E)
    group = H // G
    tile_m = max(64, triton.next_power_of_2(group))
    tile_q = max(1, tile_m // group)
    wide = max(D, E) > 128 or q_THD.dtype == torch.float32
    _prefill_attention_kernel[(T // tile_q + S, G)](
        out_THE, q_THD, k_cache_PBGD, v_cache_PBGE, block_table_SN, query_start, seq_lens_S,
        sinks_H, slopes_H, scale, softcap, S, *q_THD.stride(), block_table_SN.stride(0),
        H=H, G=G, D=D, E=E, PAGE=page, WINDOW=window, HAS_SINKS=sinks_H is not None, HAS_SOFTCAP=softcap > 0.0,
        HAS_SLOPES=slopes_H is not None,
        TILE_Q=tile_q, TILE_M=tile_m, TILE_K=32 if wide else 64,
        TILE_D=triton.next_power_of_2(max(D, 16)), TILE_E=triton.next_power_of_2(max(E, 16)),
        SEARCH_STEPS=S.bit_length(), STAGES=1 if wide else 2, num_warps=4,
    )  # fmt: skip
    return out_THE
