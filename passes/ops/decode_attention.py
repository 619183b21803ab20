"""Triton kernel of paged attention for decode steps, in which each sequence has one query.

The keys of a sequence are split between programs, so that a few long sequences fill the GPU as
well as many short ones (FlashDecoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
Each program computes the online softmax of its split (FlashAttention-2, arXiv:2307.08691) and
writes a partial result. Unlike FlashDecoding, no second kernel combines these: the program that
finishes last does, which it recognizes by a counter per sequence and key/value head. It combines
the splits in their order, so results do not depend on which program is last.

Shape suffixes:
    S: sequences, which are also the query tokens
    H: query heads
    G: key/value heads; H / G query heads share one
    D: key head dim
    E: value head dim
    P: pages of the cache
    B: tokens per page
    N: maximum pages per sequence
    M: rows of a tile, query heads that share a key/value head
    K: keys of a tile
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from passes.ops.pdl import pdl_launch_options

# Enough programs to fill a GPU several times. More would cost launch time: some find no work.
MAX_PROGRAMS = 1024
# With up to so many programs before splitting, most of a GPU is idle.
FEW_PROGRAMS = 64
MAX_SPLITS = 64
# Tiles of keys that make a split worth a program, unless programs are few.
MIN_TILES_PER_SPLIT = 2


@triton.jit
def _decode_attention_kernel(  # type: ignore[no-untyped-def]
    out, partial_out, partial_ml, split_counters, q, k_cache, v_cache, block_table, seq_lens,
    sinks, slopes, scale, softcap, max_splits, min_tiles,
    q_stride_s, q_stride_h, q_stride_d, table_stride,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SLOPES: tl.constexpr,
    USE_PDL: tl.constexpr,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, TILE_D: tl.constexpr, TILE_E: tl.constexpr,
    STAGES: tl.constexpr, TILE_S: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Attend to one split of a sequence's keys for the query heads of one key/value head.

    The grid is [S, G, max_splits]. `out` is [S, H, E] in the dtype of q; `partial_out` is
    [S, G, max_splits, H / G, E] and `partial_ml` [S, G, max_splits, H / G, 2], both float32;
    `split_counters` is [S, G], int32 zeros.
    """
    seq = tl.program_id(0)
    group = tl.program_id(1)
    split = tl.program_id(2)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()

    # The keys of this split: whole tiles, divided evenly.
    length = tl.load(seq_lens + seq)
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(length - WINDOW, 0)
    if WINDOW < 0:
        first_key = tl.maximum(length - 1, 0) // -WINDOW * -WINDOW
    begin = first_key // TILE_K * TILE_K
    tiles = tl.cdiv(length - begin, TILE_K)
    split_tiles = tl.cdiv(tiles, tl.minimum(tl.maximum(tiles // min_tiles, 1), max_splits))
    num_splits = tl.maximum(tl.cdiv(tiles, tl.maximum(split_tiles, 1)), 1)
    if split >= num_splits:
        return
    begin += split * split_tiles * TILE_K
    end = tl.minimum(begin + split_tiles * TILE_K, length)

    # The query: a row per head.
    GROUP: tl.constexpr = H // G
    row = tl.arange(0, TILE_M)
    row_mask = row < GROUP
    head = group * GROUP + row
    d = tl.arange(0, TILE_D)
    e = tl.arange(0, TILE_E)
    q_MD = tl.load(
        q + seq.to(tl.int64) * q_stride_s + head[:, None] * q_stride_h + d[None, :] * q_stride_d,
        mask=row_mask[:, None] & (d[None, :] < D), other=0.0,
    )  # fmt: skip
    slope = tl.zeros([TILE_M], tl.float32)
    if HAS_SLOPES:
        slope = tl.load(slopes + head, mask=row_mask, other=0.0).to(tl.float32)

    # Online softmax over the tiles: running maximum m_i, sum l_i and weighted values acc.
    m_i = tl.full([TILE_M], -1e30, tl.float32)
    l_i = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, TILE_E], tl.float32)
    for base in tl.range(begin, end, TILE_K, num_stages=STAGES):
        key = base + tl.arange(0, TILE_K)
        key_mask = (key >= first_key) & (key < length)
        page = tl.load(block_table + seq * table_stride + key // PAGE, mask=key_mask, other=0)
        slot = (page.to(tl.int64) * PAGE + key % PAGE) * G + group
        k_DK = tl.load(
            k_cache + slot[None, :] * D + d[:, None],
            mask=key_mask[None, :] & (d[:, None] < D),
            other=0.0,
        )
        v_KE = tl.load(
            v_cache + slot[:, None] * E + e[None, :],
            mask=key_mask[:, None] & (e[None, :] < E),
            other=0.0,
        )
        scores = tl.dot(q_MD, k_DK, input_precision="ieee") * scale
        if HAS_SOFTCAP:  # softcap * tanh(scores / softcap)
            scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
        if HAS_SLOPES:
            scores += slope[:, None] * (key - length + 1)[None, :].to(tl.float32)
        scores = tl.where(key_mask[None, :], scores, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(scores, 1))
        p = tl.exp(scores - m_new[:, None])
        alpha = tl.exp(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None] + tl.dot(p.to(v_KE.dtype), v_KE, input_precision="ieee")
        m_i = m_new

    # Write the partial result; the last program of the sequence and head combines all of them.
    out_mask = row_mask[:, None] & (e[None, :] < E)
    if num_splits > 1:
        first_split = (seq * G + group) * max_splits
        partial = (first_split + split) * GROUP + row
        tl.store(partial_out + partial[:, None] * E + e[None, :], acc, mask=out_mask)
        tl.store(partial_ml + 2 * partial, m_i, mask=row_mask)
        tl.store(partial_ml + 2 * partial + 1, l_i, mask=row_mask)
        tl.debug_barrier()  # all threads of the program have stored before one of them counts
        if tl.atomic_add(split_counters + seq * G + group, 1, sem="acq_rel") != num_splits - 1:
            return
        tl.store(split_counters + seq * G + group, 0)  # zero for the next launch
        # Load several splits at once, because the latency of a load exceeds the work on it.
        other = tl.arange(0, TILE_S)
        partial_SM = (first_split + other[:, None]) * GROUP + row[None, :]
        split_mask = (other[:, None] < num_splits) & row_mask[None, :]
        m_SM = tl.load(
            partial_ml + 2 * partial_SM, mask=split_mask, other=-1e30, cache_modifier=".cg"
        )
        l_SM = tl.load(
            partial_ml + 2 * partial_SM + 1, mask=split_mask, other=0.0, cache_modifier=".cg"
        )
        m_i = tl.max(m_SM, 0)
        l_i = tl.sum(l_SM * tl.exp(m_SM - m_i[None, :]), 0)
        acc = tl.zeros([TILE_M, TILE_E], tl.float32)
        for first in range(0, num_splits, UNROLL):
            for n in tl.static_range(UNROLL):
                partial = (first_split + first + n) * GROUP + row
                mask = row_mask & (first + n < num_splits)
                m_split = tl.load(
                    partial_ml + 2 * partial, mask=mask, other=-1e30, cache_modifier=".cg"
                )
                acc_split = tl.load(
                    partial_out + partial[:, None] * E + e[None, :],
                    mask=mask[:, None] & out_mask,
                    other=0.0,
                    cache_modifier=".cg",
                )
                acc += acc_split * tl.exp(m_split - m_i)[:, None]

    # A sink is one more score, without a value.
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=row_mask, other=0.0).to(tl.float32)
        m_new = tl.maximum(m_i, sink)
        alpha = tl.exp(m_i - m_new)
        l_i = l_i * alpha + tl.exp(sink - m_new)
        acc = acc * alpha[:, None]
    result = acc / tl.where(l_i > 0.0, l_i, 1.0)[:, None]
    out_ME = out + seq.to(tl.int64) * (H * E) + head[:, None] * E + e[None, :]
    tl.store(out_ME, result.to(out.dtype.element_ty), mask=out_mask)


def decode_attention(
    q_SHD: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, block_table_SN: Tensor,
    seq_lens_S: Tensor, split_counters: Tensor, sinks_H: Tensor | None, slopes_H: Tensor | None,
    scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """Attend with one query per sequence; see `passes.ops.paged_attention` for the arguments.

    Args:
        q_SHD: float32, float16 or bfloat16, of any strides; D and E are at most 256.
        split_counters: at least S * G int32 zeros, which are zeros again after the launch.
            Launches that may overlap, such as those of two engines, need counters of their own.

    Returns:
        [S, H, E] in the dtype of q.
    """
    S, H, D = q_SHD.shape
    _, page_size, G, E = v_cache_PBGE.shape
    assert seq_lens_S.is_contiguous()
    assert block_table_SN.stride(1) == 1
    assert split_counters.numel() >= S * G
    is_wide = max(D, E) > 128 or q_SHD.dtype == torch.float32
    tile_k = 32 if is_wide else 64
    min_tiles = 1 if S * G <= FEW_PROGRAMS else MIN_TILES_PER_SPLIT
    max_keys = block_table_SN.shape[1] * page_size
    if window:
        max_keys = min(abs(window), max_keys)
    splits = min(
        MAX_SPLITS, triton.cdiv(MAX_PROGRAMS, S * G), triton.cdiv(max_keys, min_tiles * tile_k)
    )
    splits = max(1, splits)
    out_SHE = q_SHD.new_empty(S, H, E)
    partial_out = q_SHD.new_empty(S, H, splits, E, dtype=torch.float32)
    partial_ml = q_SHD.new_empty(S, H, splits, 2, dtype=torch.float32)
    _decode_attention_kernel[(S, G, splits)](
        out_SHE, partial_out, partial_ml, split_counters, q_SHD, k_cache_PBGD, v_cache_PBGE,
        block_table_SN, seq_lens_S, sinks_H, slopes_H, scale, softcap, splits, min_tiles,
        *q_SHD.stride(), block_table_SN.stride(0),
        H=H, G=G, D=D, E=E, PAGE=page_size, WINDOW=window,
        HAS_SINKS=sinks_H is not None, HAS_SOFTCAP=softcap > 0.0, HAS_SLOPES=slopes_H is not None,
        TILE_M=max(16, triton.next_power_of_2(H // G)), TILE_K=tile_k,
        TILE_D=triton.next_power_of_2(max(D, 16)), TILE_E=triton.next_power_of_2(max(E, 16)),
        STAGES=1 if is_wide else 2, TILE_S=triton.next_power_of_2(splits), UNROLL=min(8, splits),
        num_warps=4, **pdl_launch_options(),
    )  # fmt: skip
    return out_SHE
