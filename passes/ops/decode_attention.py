"""The Triton kernel of paged attention where each sequence brings one query.

A sequence's keys are split between programs, so that a few long sequences fill the GPU as well as many short ones. Each
program leaves its share of the softmax in a workspace, and the last one to arrive puts the shares together, in their order, so
that the result does not depend on who was last (FlashDecoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html, in
one kernel).

Shapes as in `paged_attention`, which see; T = S here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from passes.ops.pdl import pdl_launch_options

PROGRAMS = (
    1024  # enough to fill a GPU several times over, and no more: an empty one costs its launch
)
FEW = 64  # programs, before any sequence is split, that leave most of a GPU idle
MAX_SPLITS = 64  # of one sequence
LEAST = 2  # tiles of keys worth a program, where programs are many


@triton.jit
def _decode_attention_kernel(  # type: ignore[no-untyped-def]
    out, shares, weights, split_counters, q, k_cache, v_cache, block_table, seq_lens, sinks, slopes, scale, softcap, num_splits, least,
    q_stride_t, q_stride_h, q_stride_d, table_stride,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SLOPES: tl.constexpr, USE_PDL: tl.constexpr,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, TILE_D: tl.constexpr, TILE_E: tl.constexpr, STAGES: tl.constexpr,
    TILE_S: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One program: a share of one sequence's keys, for all the query heads of one key head."""
    seq = tl.program_id(0)
    group = tl.program_id(1)
    split = tl.program_id(2)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    length = tl.load(seq_lens + seq)
    oldest = 0
    if WINDOW > 0:
        oldest = tl.maximum(length - WINDOW, 0)
    if WINDOW < 0:
        oldest = tl.maximum(length - 1, 0) // -WINDOW * -WINDOW
    begin = oldest // TILE_K * TILE_K
    tiles = tl.cdiv(length - begin, TILE_K)
    tiles_each = tl.cdiv(tiles, tl.minimum(tl.maximum(tiles // least, 1), num_splits))
    num_shares = tl.maximum(tl.cdiv(tiles, tl.maximum(tiles_each, 1)), 1)
    if split >= num_shares:
        return
    begin += split * tiles_each * TILE_K
    end = tl.minimum(begin + tiles_each * TILE_K, length)

    GROUP: tl.constexpr = H // G
    row = tl.arange(0, TILE_M)
    live = row < GROUP
    head = group * GROUP + row
    d = tl.arange(0, TILE_D)
    e = tl.arange(0, TILE_E)
    q_MD = tl.load(
        q + seq.to(tl.int64) * q_stride_t + head[:, None] * q_stride_h + d[None, :] * q_stride_d,
        mask=live[:, None] & (d[None, :] < D), other=0.0,
    )  # fmt: skip
    slope = tl.zeros([TILE_M], tl.float32)
    if HAS_SLOPES:
        slope = tl.load(slopes + head, mask=live, other=0.0).to(tl.float32)
    peak = tl.full([TILE_M], -1e30, tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, TILE_E], tl.float32)
    for base in tl.range(begin, end, TILE_K, num_stages=STAGES):
        key = base + tl.arange(0, TILE_K)
        cached = (key >= oldest) & (key < length)
        page = tl.load(block_table + seq * table_stride + key // PAGE, mask=cached, other=0).to(
            tl.int64
        )
        slot = (page * PAGE + key % PAGE) * G + group
        k_DK = tl.load(
            k_cache + slot[None, :] * D + d[:, None],
            mask=cached[None, :] & (d[:, None] < D),
            other=0.0,
        )
        v_KE = tl.load(
            v_cache + slot[:, None] * E + e[None, :],
            mask=cached[:, None] & (e[None, :] < E),
            other=0.0,
        )
        scores = tl.dot(q_MD, k_DK, input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = softcap * (
                2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0
            )  # softcap * tanh(scores / softcap)
        if HAS_SLOPES:
            scores += slope[:, None] * (key - length + 1)[None, :].to(tl.float32)
        scores = tl.where(cached[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        likely = tl.exp(scores - new_peak[:, None])
        shrink = tl.exp(peak - new_peak)
        total = total * shrink + tl.sum(likely, 1)
        acc = acc * shrink[:, None] + tl.dot(likely.to(v_KE.dtype), v_KE, input_precision="ieee")
        peak = new_peak

    e_live = live[:, None] & (e[None, :] < E)
    if num_shares > 1:
        place = (seq * G + group) * num_splits
        at = (place + split) * GROUP + row
        tl.store(shares + at[:, None] * E + e[None, :], acc, mask=e_live)
        tl.store(weights + 2 * at, peak, mask=live)
        tl.store(weights + 2 * at + 1, total, mask=live)
        tl.debug_barrier()  # every thread's share is written before one of them says so
        if tl.atomic_add(split_counters + seq * G + group, 1, sem="acq_rel") != num_shares - 1:
            return
        tl.store(split_counters + seq * G + group, 0)  # as it was found, for the next launch
        # The loads of several shares are under way at once: each takes longer than all that is done with it.
        other = tl.arange(0, TILE_S)
        at_SM = (place + other[:, None]) * GROUP + row[None, :]
        there = (other[:, None] < num_shares) & live[None, :]
        peak_SM = tl.load(weights + 2 * at_SM, mask=there, other=-1e30, cache_modifier=".cg")
        total_SM = tl.load(weights + 2 * at_SM + 1, mask=there, other=0.0, cache_modifier=".cg")
        peak = tl.max(peak_SM, 0)
        total = tl.sum(total_SM * tl.exp(peak_SM - peak[None, :]), 0)
        acc = tl.zeros([TILE_M, TILE_E], tl.float32)
        for first in range(0, num_shares, AT_ONCE):
            for n in tl.static_range(AT_ONCE):
                at = (place + first + n) * GROUP + row
                mine = live & (first + n < num_shares)
                its_peak = tl.load(weights + 2 * at, mask=mine, other=-1e30, cache_modifier=".cg")
                share = tl.load(
                    shares + at[:, None] * E + e[None, :],
                    mask=mine[:, None] & e_live,
                    other=0.0,
                    cache_modifier=".cg",
                )
                acc += share * tl.exp(its_peak - peak)[:, None]
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32)
        new_peak = tl.maximum(peak, sink)
        shrink = tl.exp(peak - new_peak)
        total = total * shrink + tl.exp(sink - new_peak)
        acc = acc * shrink[:, None]
    result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    place = out + seq.to(tl.int64) * (H * E) + head[:, None] * E + e[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=e_live)


def decode_attention(
    q_SHD: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, block_table_SN: Tensor, seq_lens_S: Tensor, split_counters: Tensor,
    sinks_H: Tensor | None, slopes_H: Tensor | None, scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """q may have any strides; head dims up to 256; `split_counters`: at least S * G zeros, int32, which are zeros again afterwards."""
    S, H, D = q_SHD.shape
    _, page, G, E = v_cache_PBGE.shape
    assert seq_lens_S.is_contiguous()
    assert block_table_SN.stride(1) == 1
    assert split_counters.numel() >= S * G
    wide = max(D, E) > 128 or q_SHD.dtype == torch.float32
    tile_k = 32 if wide else 64
    longest = block_table_SN.shape[1] * page
    if window:
        longest = min(abs(window), longest)
    least = 1 if S * G <= FEW else LEAST
    splits = max(
        1, min(MAX_SPLITS, triton.cdiv(PROGRAMS, S * G), triton.cdiv(longest, least * tile_k))
    )
    out_SHE = q_SHD.new_empty(S, H, E)
    shares = q_SHD.new_empty(S, H, splits, E, dtype=torch.float32)
    weights = q_SHD.new_empty(S, H, splits, 2, dtype=torch.float32)
    _decode_attention_kernel[(S, G, splits)](
        out_SHE, shares, weights, split_counters, q_SHD, k_cache_PBGD, v_cache_PBGE, block_table_SN, seq_lens_S,
        sinks_H, slopes_H, scale, softcap, splits, least, *q_SHD.stride(), block_table_SN.stride(0),
        H=H, G=G, D=D, E=E, PAGE=page, WINDOW=window,
        HAS_SINKS=sinks_H is not None, HAS_SOFTCAP=softcap > 0.0, HAS_SLOPES=slopes_H is not None,
        TILE_M=max(16, triton.next_power_of_2(H // G)), TILE_K=tile_k,
        TILE_D=triton.next_power_of_2(max(D, 16)), TILE_E=triton.next_power_of_2(max(E, 16)),
        STAGES=1 if wide else 2, TILE_S=triton.next_power_of_2(splits), AT_ONCE=min(8, splits), num_warps=4, **pdl_launch_options(),
    )  # fmt: skip
    return out_SHE
