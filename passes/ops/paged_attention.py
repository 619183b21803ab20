"""Causal attention of a ragged batch of queries over a paged key/value cache.

Shapes: T tokens of S sequences, H query heads, G key/value heads (G divides H), D key head dim, E value head dim,
P pages in the pool, B tokens a page (a power of two), N pages a sequence at most.

Sequence s owns the queries `query_start[s] : query_start[s + 1]`, which are the last ones of its `seq_lens[s]` tokens;
its token i lies in page `block_table[s, i // B]` at offset `i % B`. Lengths, starts and tables are int32 tensors and
reach neither the grid nor the code. Rows of sequences with `seq_lens[s] == 0`, and tokens past the last start, are
zeros in the output, whatever the cache holds there. `window` is how many tokens back a query sees, itself included; 0 for all of
them; -C for those of its own chunk, where chunks of C tokens follow each other. Pages that no query sees any more are not read, so
they may serve others. With `slopes`, a head's scores lose its slope for each token from query to key (ALiBi, arXiv:2108.12409).
`split_counters` is the decode kernel's: zeros before and after (see `decode_attention`).
"""

import torch
from torch import Tensor

from passes.attention_reach import AttentionReach
from passes.ops import cpu
from passes.ops.decode_attention import decode_attention
from passes.ops.library import define_op
from passes.ops.prefill_attention import prefill_attention


def paged_attention_reference(
    q_THD: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, block_table_SN: Tensor, query_start: Tensor, seq_lens_S: Tensor,
    split_counters: Tensor, sinks_H: Tensor | None, slopes_H: Tensor | None, scale: float, window: int, softcap: float,
    max_query_len: int,
) -> Tensor:  # fmt: skip
    """Plain PyTorch, softmax in float32. Waits for the device, so it is not for capture.

    Sequences, or the queries of one, are taken so many at a time that what is in memory at once stays within bounds.
    """
    T, H, _ = q_THD.shape
    out_THE = q_THD.new_zeros(T, H, v_cache_PBGE.shape[-1])
    options, caches, most = (
        (sinks_H, slopes_H, scale, window, softcap),
        (k_cache_PBGD, v_cache_PBGE),
        int(seq_lens_S.max()),
    )
    if max_query_len == 1:
        of_a_key = H + sum(cache[0, 0].numel() for cache in caches)
        for rows in _slices(0, T, _AT_ONCE // max(1, most * of_a_key)):
            lens = seq_lens_S[rows].long()
            positions = lens[:, None] - 1
            keys, values = (
                _gather(cache, block_table_SN[rows], positions, window) for cache in caches
            )
            attended = dense_attention(q_THD[rows, None], keys, values, positions, lens, *options)[
                :, 0
            ]
            out_THE[rows] = torch.where(lens[:, None, None] > 0, attended, 0)
        return out_THE
    starts = query_start.tolist()
    for s, length in enumerate(seq_lens_S.tolist()):
        first, lens = length - (starts[s + 1] - starts[s]), seq_lens_S[s : s + 1].long()
        for rows in _slices(
            starts[s], starts[s + 1] if length else starts[s], _AT_ONCE // (max(1, length) * H)
        ):
            positions = torch.arange(rows.start, rows.stop, device=q_THD.device)[None] + (
                first - starts[s]
            )
            keys, values = (
                _gather(cache, block_table_SN[s : s + 1], positions, window) for cache in caches
            )
            out_THE[rows] = dense_attention(
                q_THD[rows][None], keys, values, positions, lens, *options
            )[0]
    return out_THE


_AT_ONCE = 2**26  # elements, 256 MiB in float32


def _slices(begin: int, end: int, size: int) -> list[slice]:
    return [slice(at, min(end, at + max(1, size))) for at in range(begin, end, max(1, size))]


def _gather(
    cache_PBGD: Tensor, block_table_SN: Tensor, positions_SQ: Tensor, window: int
) -> Tensor:
    """The cached tokens of each sequence, [S, longest, G, D]; what none of its queries sees repeats one that is seen."""
    block_size = cache_PBGD.shape[1]
    last_S1 = positions_SQ[:, -1:].clamp(min=0)
    first_S1 = AttentionReach.decode(window).first_visible(positions_SQ[:, :1]).clamp(min=0)
    tokens_SK = (
        torch.arange(int(last_S1.max()) + 1, device=last_S1.device)
        .minimum(last_S1)
        .maximum(first_S1)
    )
    pages_SK = block_table_SN.long().gather(1, tokens_SK // block_size)
    return cache_PBGD.view(-1, *cache_PBGD.shape[2:])[
        pages_SK * block_size + tokens_SK % block_size
    ]


def dense_attention(
    q_SQHD: Tensor, k_SKGD: Tensor, v_SKGE: Tensor, positions_SQ: Tensor, lens_S: Tensor,
    sinks_H: Tensor | None, slopes_H: Tensor | None, scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """softmax(q k^T) v in plain PyTorch, over the keys each position may see; positions_SQ are those of the queries in their
    sequences, of which lens_S tokens are there.
    """
    S, Q, H, D = q_SQHD.shape
    K, G = k_SKGD.shape[1:3]
    q_SGMD = (
        q_SQHD.view(S, Q, G, H // G, D).permute(0, 2, 3, 1, 4).reshape(S, G, H // G * Q, D).float()
    )
    scores = (q_SGMD @ k_SKGD.permute(0, 2, 3, 1).float() * scale).view(S, G, H // G, Q, K)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    keys = torch.arange(K, device=q_SQHD.device)
    if slopes_H is not None:
        scores += (
            slopes_H.float().view(1, G, H // G, 1, 1)
            * (keys - positions_SQ[..., None])[:, None, None]
        )
    seen_SQK = (keys <= positions_SQ[..., None]) & (keys < lens_S[:, None, None])
    seen_SQK &= keys >= AttentionReach.decode(window).first_visible(positions_SQ)[..., None]
    scores = scores.masked_fill(~seen_SQK[:, None, None], float("-inf"))
    if sinks_H is not None:
        sink = sinks_H.float().view(1, G, H // G, 1, 1).expand(S, G, H // G, Q, 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :K].reshape(S, G, H // G * Q, K)
    out = (weights @ v_SKGE.permute(0, 2, 1, 3).float()).view(S, G, H // G, Q, -1)
    return out.permute(0, 3, 1, 2, 4).reshape(S, Q, H, -1).to(q_SQHD.dtype)


def paged_attention_kernel(
    q_THD: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, block_table_SN: Tensor, query_start: Tensor, seq_lens_S: Tensor,
    split_counters: Tensor, sinks_H: Tensor | None, slopes_H: Tensor | None, scale: float, window: int, softcap: float,
    max_query_len: int,
) -> Tensor:  # fmt: skip
    """Triton. q may have any strides; head dims up to 256; a page is a power of two of at least 16 tokens."""
    if max_query_len == 1:
        return decode_attention(
            q_THD,
            k_cache_PBGD,
            v_cache_PBGE,
            block_table_SN,
            seq_lens_S,
            split_counters,
            sinks_H,
            slopes_H,
            scale,
            window,
            softcap,
        )
    return prefill_attention(
        q_THD,
        k_cache_PBGD,
        v_cache_PBGE,
        block_table_SN,
        query_start,
        seq_lens_S,
        sinks_H,
        slopes_H,
        scale,
        window,
        softcap,
    )


def paged_attention_cpu(
    q_THD: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, block_table_SN: Tensor, query_start: Tensor, seq_lens_S: Tensor,
    split_counters: Tensor, sinks_H: Tensor | None, slopes_H: Tensor | None, scale: float, window: int, softcap: float,
    max_query_len: int,
) -> Tensor:  # fmt: skip
    """C++ in float32, else the reference."""
    if q_THD.dtype != torch.float32:
        return paged_attention_reference(
            q_THD, k_cache_PBGD, v_cache_PBGE, block_table_SN, query_start, seq_lens_S, split_counters,
            sinks_H, slopes_H, scale, window, softcap, max_query_len,
        )  # fmt: skip
    if max_query_len == 1:
        return cpu.decode_attention(
            q_THD,
            k_cache_PBGD,
            v_cache_PBGE,
            block_table_SN,
            seq_lens_S,
            sinks_H,
            slopes_H,
            scale,
            window,
            softcap,
        )
    return cpu.prefill_attention(
        q_THD,
        k_cache_PBGD,
        v_cache_PBGE,
        block_table_SN,
        query_start,
        seq_lens_S,
        sinks_H,
        slopes_H,
        scale,
        window,
        softcap,
    )


def _paged_attention_fake(
    q_THD: Tensor, k_cache: Tensor, v_cache_PBGE: Tensor, *_: object
) -> Tensor:
    return q_THD.new_empty(q_THD.shape[0], q_THD.shape[1], v_cache_PBGE.shape[-1])


paged_attention = define_op(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor query_start, Tensor seq_lens, "
    "Tensor split_counters, Tensor? sinks, Tensor? slopes, float scale, int window, float softcap, int max_query_len) -> Tensor",
    reference=paged_attention_reference,
    kernel=paged_attention_kernel,
    fake=_paged_attention_fake,
    cpu=paged_attention_cpu,
)
