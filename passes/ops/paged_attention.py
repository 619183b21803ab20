"""Causal attention of a ragged batch of queries over a paged key/value cache.

Shapes: T tokens of S sequences, H query heads, G key/value heads (G divides H), D key head dim, E value head dim,
P pages in the pool, B tokens a page (a power of two), N pages a sequence at most.

Sequence s owns the queries `query_start[s] : query_start[s + 1]`, which are the last ones of its `seq_lens[s]` tokens;
its token i lies in page `block_table[s, i // B]` at offset `i % B`. Lengths, starts and tables are int32 tensors and
reach neither the grid nor the code. Rows of sequences with `seq_lens[s] == 0`, and tokens past the last start, are
zeros in the output, whatever the cache holds there. `window` is how many tokens back a query sees, itself included; 0 for all of
them; -C for those of its own chunk, where chunks of C tokens follow each other. Pages that no query sees any more are not read, so
they may serve others. `arrivals` is the decode kernel's: zeros before and after (see `decode_attention`).

The kernel computes softmax online, one tile of keys at a time (FlashAttention-2, arXiv:2307.08691), over pages found
through the table (PagedAttention, arXiv:2309.06180); the query heads that share a key head fill one tile of rows.
"""

from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from passes.ops import cpu
from passes.ops.decode_attention import decode_attention
from passes.ops.library import define

Positions = TypeVar("Positions", int, Tensor)


def paged_attention_reference(
    q_THD: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, block_table_SN: Tensor, query_start: Tensor, seq_lens_S: Tensor,
    arrivals: Tensor, sinks_H: Tensor | None, scale: float, window: int, softcap: float, max_query_len: int,
) -> Tensor:  # fmt: skip
    """Plain PyTorch, softmax in float32. Waits for the device, so it is not for capture."""
    T, H, _ = q_THD.shape
    out_THE = q_THD.new_zeros(T, H, v_cache_PBGE.shape[-1])
    options = (sinks_H, scale, window, softcap)
    if max_query_len == 1:
        lens = seq_lens_S.long()
        positions = lens[:, None] - 1
        keys, values = (_gather(cache, block_table_SN, positions, window) for cache in (k_cache_PBGD, v_cache_PBGE))
        attended = _attend(q_THD[:, None], keys, values, positions, lens, *options)[:, 0]
        return torch.where(lens[:, None, None] > 0, attended, out_THE)
    starts = query_start.tolist()
    for s, length in enumerate(seq_lens_S.tolist()):
        if length == 0:
            continue
        rows = slice(starts[s], starts[s + 1])
        table, lens = block_table_SN[s : s + 1], seq_lens_S[s : s + 1].long()
        positions = torch.arange(length - (rows.stop - rows.start), length, device=q_THD.device)[None]
        keys, values = (_gather(cache, table, positions, window) for cache in (k_cache_PBGD, v_cache_PBGE))
        out_THE[rows] = _attend(q_THD[rows][None], keys, values, positions, lens, *options)[0]
    return out_THE


def oldest_seen(positions: Positions, window: int) -> Positions:
    """The first token that a query at each of these positions sees; below 0 where it sees all."""
    if window < 0:
        return positions // -window * -window
    return positions - window + 1 if window else positions * 0


def _gather(cache_PBGD: Tensor, block_table_SN: Tensor, positions_SQ: Tensor, window: int) -> Tensor:
    """The cached tokens of each sequence, [S, longest, G, D]; what none of its queries sees repeats one that is seen."""
    block_size = cache_PBGD.shape[1]
    last_S1 = positions_SQ[:, -1:].clamp(min=0)
    first_S1 = oldest_seen(positions_SQ[:, :1], window).clamp(min=0)
    tokens_SK = torch.arange(int(last_S1.max()) + 1, device=last_S1.device).minimum(last_S1).maximum(first_S1)
    pages_SK = block_table_SN.long().gather(1, tokens_SK // block_size)
    return cache_PBGD.view(-1, *cache_PBGD.shape[2:])[pages_SK * block_size + tokens_SK % block_size]


def _attend(
    q_SQHD: Tensor, k_SKGD: Tensor, v_SKGE: Tensor, positions_SQ: Tensor, lens_S: Tensor,
    sinks_H: Tensor | None, scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """softmax(q k^T) v over the keys each position may see; positions_SQ are those of the queries in their sequences."""
    S, Q, H, D = q_SQHD.shape
    K, G = k_SKGD.shape[1:3]
    q_SGMD = q_SQHD.view(S, Q, G, H // G, D).permute(0, 2, 3, 1, 4).reshape(S, G, H // G * Q, D).float()
    scores = (q_SGMD @ k_SKGD.permute(0, 2, 3, 1).float() * scale).view(S, G, H // G, Q, K)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    keys = torch.arange(K, device=q_SQHD.device)
    seen_SQK = (keys <= positions_SQ[..., None]) & (keys < lens_S[:, None, None])
    seen_SQK &= keys >= oldest_seen(positions_SQ, window)[..., None]
    scores = scores.masked_fill(~seen_SQK[:, None, None], float("-inf"))
    if sinks_H is not None:
        sink = sinks_H.float().view(1, G, H // G, 1, 1).expand(S, G, H // G, Q, 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :K].reshape(S, G, H // G * Q, K)
    out = (weights @ v_SKGE.permute(0, 2, 1, 3).float()).view(S, G, H // G, Q, -1)
    return out.permute(0, 3, 1, 2, 4).reshape(S, Q, H, -1).to(q_SQHD.dtype)


@triton.jit
def _attend_tile(  # type: ignore[no-untyped-def]
    peak, total, acc, q_MD, base, k_cache, v_cache, pages, group, position, oldest, length, scale, softcap,
    G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr, TILE_K: tl.constexpr, TILE_D: tl.constexpr, TILE_E: tl.constexpr,
):  # fmt: skip
    """Softmax's running peak, total and weighted sum with one more tile of keys; without a mask, every row sees all of them."""
    key = base + tl.arange(0, TILE_K)
    d = tl.arange(0, TILE_D)
    e = tl.arange(0, TILE_E)
    cached = (key >= oldest) & (key < length)
    page = tl.load(pages + key // PAGE, mask=cached if MASKED else None, other=0 if MASKED else None).to(tl.int64)
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
def _paged_attention_kernel(  # type: ignore[no-untyped-def]
    out, q, k_cache, v_cache, block_table, query_start, seq_lens, sinks, scale, softcap, num_seqs,
    q_stride_t, q_stride_h, q_stride_d, table_stride,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr, TILE_D: tl.constexpr, TILE_E: tl.constexpr,
    SEARCH_STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: TILE_Q queries of one sequence, with all the query heads of one key head as the TILE_M rows of a tile."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tile of a sequence has most to do, so it starts first
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
                peak, total, acc, q_MD, base, k_cache, v_cache, pages, group, position, oldest, length, scale, softcap,
                G, D, E, PAGE, WINDOW, HAS_SOFTCAP, False, TILE_K, TILE_D, TILE_E,
            )  # fmt: skip
        begin = all_see
    for base in tl.range(begin, end, TILE_K, num_stages=STAGES):
        peak, total, acc = _attend_tile(
            peak, total, acc, q_MD, base, k_cache, v_cache, pages, group, position, oldest, length, scale, softcap,
            G, D, E, PAGE, WINDOW, HAS_SOFTCAP, True, TILE_K, TILE_D, TILE_E,
        )  # fmt: skip
    result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(
        out + token[:, None] * (H * E) + head[:, None] * E + e[None, :], result.to(out.dtype.element_ty),
        mask=live[:, None] & (e[None, :] < E),
    )  # fmt: skip


def paged_attention_kernel(
    q_THD: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, block_table_SN: Tensor, query_start: Tensor, seq_lens_S: Tensor,
    arrivals: Tensor, sinks_H: Tensor | None, scale: float, window: int, softcap: float, max_query_len: int,
) -> Tensor:  # fmt: skip
    """Triton. q may have any strides; head dims up to 256; a page is a power of two of at least 16 tokens."""
    if max_query_len == 1:
        return decode_attention(
            q_THD, k_cache_PBGD, v_cache_PBGE, block_table_SN, seq_lens_S, arrivals, sinks_H, scale, window, softcap
        )
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
    _paged_attention_kernel[(T // tile_q + S, G)](
        out_THE, q_THD, k_cache_PBGD, v_cache_PBGE, block_table_SN, query_start, seq_lens_S,
        sinks_H, scale, softcap, S, *q_THD.stride(), block_table_SN.stride(0),
        H=H, G=G, D=D, E=E, PAGE=page, WINDOW=window, HAS_SINKS=sinks_H is not None, HAS_SOFTCAP=softcap > 0.0,
        TILE_Q=tile_q, TILE_M=tile_m, TILE_K=32 if wide else 64,
        TILE_D=triton.next_power_of_2(max(D, 16)), TILE_E=triton.next_power_of_2(max(E, 16)),
        SEARCH_STEPS=S.bit_length(), STAGES=1 if wide else 2, num_warps=4,
    )  # fmt: skip
    return out_THE


def paged_attention_cpu(
    q_THD: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, block_table_SN: Tensor, query_start: Tensor, seq_lens_S: Tensor,
    arrivals: Tensor, sinks_H: Tensor | None, scale: float, window: int, softcap: float, max_query_len: int,
) -> Tensor:  # fmt: skip
    """C++ for one query a sequence in float32, else the reference."""
    if max_query_len > 1 or q_THD.dtype != torch.float32:
        return paged_attention_reference(
            q_THD, k_cache_PBGD, v_cache_PBGE, block_table_SN, query_start, seq_lens_S, arrivals,
            sinks_H, scale, window, softcap, max_query_len,
        )  # fmt: skip
    return cpu.decode_attention(q_THD, k_cache_PBGD, v_cache_PBGE, block_table_SN, seq_lens_S, sinks_H, scale, window, softcap)


def _paged_attention_fake(q_THD: Tensor, k_cache: Tensor, v_cache_PBGE: Tensor, *_: object) -> Tensor:
    return q_THD.new_empty(q_THD.shape[0], q_THD.shape[1], v_cache_PBGE.shape[-1])


paged_attention = define(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor query_start, Tensor seq_lens, "
    "Tensor arrivals, Tensor? sinks, float scale, int window, float softcap, int max_query_len) -> Tensor",
    reference=paged_attention_reference,
    kernel=paged_attention_kernel,
    fake=_paged_attention_fake,
    cpu=paged_attention_cpu,
)
