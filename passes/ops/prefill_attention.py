"""Triton kernel of paged attention for steps in which sequences have several queries.

The softmax is computed online, one tile of keys at a time (FlashAttention-2, arXiv:2307.08691).
Keys and values are read through the block table (PagedAttention, arXiv:2309.06180). The query
heads that share a key/value head are rows of one tile, so that they share its loads.

Shape suffixes:
    T: query tokens of S sequences
    S: sequences
    H: query heads
    G: key/value heads; H / G query heads share one
    D: key head dim
    E: value head dim
    P: pages of the cache
    B: tokens per page
    N: maximum pages per sequence
    M: rows of a tile, a query token and head each
    K: keys of a tile
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _attend_tile(  # type: ignore[no-untyped-def]
    m_i, l_i, acc, q_MD, base, k_cache, v_cache, pages, group, position, first_key, length,
    scale, softcap, slope,
    G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SLOPES: tl.constexpr, MASKED: tl.constexpr,
    TILE_K: tl.constexpr, TILE_D: tl.constexpr, TILE_E: tl.constexpr,
):  # fmt: skip
    """Update the running maximum m_i, sum l_i and weighted values acc with one tile of keys.

    m_i is a maximum of scores times log2(e), because exp2 is cheaper than exp. Unless MASKED, all
    rows attend to all keys of the tile.
    """
    # Load the tile through the block table.
    key = base + tl.arange(0, TILE_K)
    d = tl.arange(0, TILE_D)
    e = tl.arange(0, TILE_E)
    key_mask = (key >= first_key) & (key < length)
    page = tl.load(
        pages + key // PAGE, mask=key_mask if MASKED else None, other=0 if MASKED else None
    ).to(tl.int64)
    slot = (page * PAGE + key % PAGE) * G + group
    k_ptr_DK = k_cache + slot[None, :] * D + d[:, None]
    v_ptr_KE = v_cache + slot[:, None] * E + e[None, :]
    if MASKED or TILE_D != D or TILE_E != E:
        k_DK = tl.load(k_ptr_DK, mask=key_mask[None, :] & (d[:, None] < D), other=0.0)
        v_KE = tl.load(v_ptr_KE, mask=key_mask[:, None] & (e[None, :] < E), other=0.0)
    else:
        k_DK = tl.load(k_ptr_DK)
        v_KE = tl.load(v_ptr_KE)

    # Scores: modify and mask.
    scores = tl.dot(q_MD, k_DK, input_precision="ieee")
    if HAS_SOFTCAP:  # softcap * tanh(scores * scale / softcap)
        scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * (scores * scale) / softcap)) - 1.0)
        scale = 1.0
    scale *= 1.4426950408889634  # log2(e): exp(x) = exp2(x * log2(e))
    if HAS_SLOPES:
        scores = scores * scale + slope[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
        scale = 1.0
    if MASKED:
        mask = key_mask[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            mask = mask & (key[None, :] > position[:, None] - WINDOW)
        if WINDOW < 0:
            mask = mask & (key[None, :] >= position[:, None] // -WINDOW * -WINDOW)
        scores = tl.where(mask, scores, float("-inf"))

    # Online softmax. p is rounded alike with and without a mask.
    m_new = tl.maximum(m_i, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    return m_new, l_i, tl.dot(p.to(v_KE.dtype), v_KE, acc, input_precision="ieee")


@triton.jit
def _prefill_attention_kernel(  # type: ignore[no-untyped-def]
    out, q, k_cache, v_cache, block_table, query_start, seq_lens, sinks, slopes,
    scale, softcap, num_seqs, q_stride_t, q_stride_h, q_stride_d, table_stride,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SLOPES: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
    TILE_D: tl.constexpr, TILE_E: tl.constexpr, SEARCH_STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend with TILE_Q queries of one sequence, for the query heads of one key/value head.

    The grid is [T // TILE_Q + S, G]. The rows of a tile are TILE_Q * H / G pairs of query and head,
    padded to TILE_M.
    """
    # The last tiles of a sequence attend to the most keys, so tiles start in reverse order.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    group = tl.program_id(1)

    # Find the sequence of the tile. The tiles of sequence s begin at `query_start[s] // TILE_Q +
    # s`, which accounts for a partial last tile of each sequence before it: search for the last s
    # that begins at or before this tile.
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

    # The queries of the tile. Their positions count from the start of the sequence.
    GROUP: tl.constexpr = H // G
    rows = tl.arange(0, TILE_M)
    query = first + rows // GROUP
    head = group * GROUP + rows % GROUP
    row_mask = (rows < TILE_Q * GROUP) & (query < num_queries)
    first_position = length - num_queries + first
    position = length - num_queries + query
    d = tl.arange(0, TILE_D)
    e = tl.arange(0, TILE_E)
    token = (start + query).to(tl.int64)
    q_MD = tl.load(
        q + token[:, None] * q_stride_t + head[:, None] * q_stride_h + d[None, :] * q_stride_d,
        mask=row_mask[:, None] & (d[None, :] < D), other=0.0,
    )  # fmt: skip

    # Running state of the softmax. A sink is one more score, without a value.
    if HAS_SINKS:
        m_i = tl.load(sinks + head, mask=row_mask, other=0.0).to(tl.float32) * 1.4426950408889634
        l_i = tl.full([TILE_M], 1.0, tl.float32)
    else:
        m_i = tl.full([TILE_M], -1e30, tl.float32)
        l_i = tl.zeros([TILE_M], tl.float32)
    slope = tl.zeros([TILE_M], tl.float32)
    if HAS_SLOPES:
        slope = tl.load(slopes + head, mask=row_mask, other=0.0).to(tl.float32) * 1.4426950408889634
    acc = tl.zeros([TILE_M, TILE_E], tl.float32)

    # Iterate over the keys that some row attends to: first tiles that every row attends to in
    # full, which need no mask, then the rest.
    pages = block_table + seq * table_stride
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(first_position - WINDOW + 1, 0)
    if WINDOW < 0:
        first_key = first_position // -WINDOW * -WINDOW
    begin = first_key // TILE_K * TILE_K
    end = tl.minimum(first_position + TILE_Q, length)
    if WINDOW == 0:
        unmasked_end = (first_position + 1) // TILE_K * TILE_K
        for base in tl.range(0, unmasked_end, TILE_K, num_stages=STAGES):
            m_i, l_i, acc = _attend_tile(
                m_i, l_i, acc, q_MD, base, k_cache, v_cache, pages, group, position, first_key,
                length, scale, softcap, slope,
                G, D, E, PAGE, WINDOW, HAS_SOFTCAP, HAS_SLOPES, False, TILE_K, TILE_D, TILE_E,
            )  # fmt: skip
        begin = unmasked_end
    for base in tl.range(begin, end, TILE_K, num_stages=STAGES):
        m_i, l_i, acc = _attend_tile(
            m_i, l_i, acc, q_MD, base, k_cache, v_cache, pages, group, position, first_key,
            length, scale, softcap, slope,
            G, D, E, PAGE, WINDOW, HAS_SOFTCAP, HAS_SLOPES, True, TILE_K, TILE_D, TILE_E,
        )  # fmt: skip
    result = acc / tl.where(l_i > 0.0, l_i, 1.0)[:, None]
    tl.store(
        out + token[:, None] * (H * E) + head[:, None] * E + e[None, :],
        result.to(out.dtype.element_ty),
        mask=row_mask[:, None] & (e[None, :] < E),
    )


def prefill_attention(
    q_THD: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, block_table_SN: Tensor,
    query_start: Tensor, seq_lens_S: Tensor, sinks_H: Tensor | None, slopes_H: Tensor | None,
    scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """Attend with any number of queries per sequence.

    See `passes.ops.paged_attention` for the arguments. q is float32, float16 or bfloat16 of any
    strides; D and E are at most 256.

    Returns:
        [T, H, E] in the dtype of q.
    """
    T, H, D = q_THD.shape
    _, page_size, G, E = v_cache_PBGE.shape
    assert query_start.is_contiguous()
    assert seq_lens_S.is_contiguous()
    assert block_table_SN.stride(1) == 1
    S = seq_lens_S.shape[0]
    out_THE = q_THD.new_zeros(T, H, E)
    group = H // G
    tile_m = max(64, triton.next_power_of_2(group))
    tile_q = max(1, tile_m // group)
    is_wide = max(D, E) > 128 or q_THD.dtype == torch.float32
    _prefill_attention_kernel[(T // tile_q + S, G)](
        out_THE, q_THD, k_cache_PBGD, v_cache_PBGE, block_table_SN, query_start, seq_lens_S,
        sinks_H, slopes_H, scale, softcap, S, *q_THD.stride(), block_table_SN.stride(0),
        H=H, G=G, D=D, E=E, PAGE=page_size, WINDOW=window,
        HAS_SINKS=sinks_H is not None, HAS_SOFTCAP=softcap > 0.0, HAS_SLOPES=slopes_H is not None,
        TILE_Q=tile_q, TILE_M=tile_m, TILE_K=32 if is_wide else 64,
        TILE_D=triton.next_power_of_2(max(D, 16)), TILE_E=triton.next_power_of_2(max(E, 16)),
        SEARCH_STEPS=S.bit_length(), STAGES=1 if is_wide else 2, num_warps=4,
    )  # fmt: skip
    return out_THE
