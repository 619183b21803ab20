"""Causal attention of a ragged batch of queries over a paged KV cache.

Shape suffixes:
    T: query tokens of S sequences
    S: sequences
    H: query heads
    G: key/value heads; H / G query heads share one
    D: key head dim
    E: value head dim
    P: pages of the cache
    B: tokens per page, a power of two
    N: maximum pages per sequence

The queries of sequence s are `q[query_start[s] : query_start[s + 1]]` and belong to the last of its
`seq_lens[s]` tokens, whose keys and values are in the cache already. Token i of a sequence is in
page `block_table[s, i // B]` at offset `i % B`. The grid and the compiled code depend on the
shapes of `query_start`, `seq_lens` and `block_table`, not on their values.

Arguments of the op:

- `query_start` [S + 1], `seq_lens` [S] and `block_table` [S, N] are int32.
- `split_counters` is int32 scratch memory of the decode kernel, zeros before and after a call;
  see `passes.ops.decode_attention`.
- `sinks` [H] are scores without a value that take part in the softmax, as in gpt-oss.
- `slopes` [H] bias a head's scores by `-slope * distance` between query and key (ALiBi,
  arXiv:2108.12409).
- `window` limits the keys of a query, as encoded by `passes.attention_reach`: 0 for all before it,
  n > 0 for the last n including its own, -n for those of its own chunk of n tokens. Pages that no
  query attends to are not read.
- `softcap` > 0 replaces scores by `softcap * tanh(scores / softcap)`.
- `max_query_len` is a static upper bound on the queries of a sequence. 1 selects the decode
  kernel, for which T = S.

Output rows of sequences with `seq_lens[s] == 0` and of tokens past `query_start[S]` are zeros.
"""

import torch
from torch import Tensor

from passes.attention_reach import AttentionReach
from passes.ops import cpu
from passes.ops.decode_attention import decode_attention
from passes.ops.library import define_op
from passes.ops.prefill_attention import prefill_attention

# Upper bound on the elements of an intermediate tensor of the reference: 256 MiB in float32.
_MAX_ELEMENTS = 2**26


def paged_attention_reference(
    q_THD: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, block_table_SN: Tensor,
    query_start: Tensor, seq_lens_S: Tensor, split_counters: Tensor, sinks_H: Tensor | None,
    slopes_H: Tensor | None, scale: float, window: int, softcap: float, max_query_len: int,
) -> Tensor:  # fmt: skip
    """Return attention [T, H, E] in the dtype of q, in plain PyTorch with a softmax in float32.

    It synchronizes with the device, so it cannot be captured in a CUDA graph. Sequences, or the
    queries of a sequence, are processed in slices of bounded memory.
    """
    options = (sinks_H, slopes_H, scale, window, softcap)
    caches = (k_cache_PBGD, v_cache_PBGE)
    if max_query_len == 1:
        return _decode_reference(q_THD, caches, block_table_SN, seq_lens_S, options)
    return _prefill_reference(q_THD, caches, block_table_SN, query_start, seq_lens_S, options)


# sinks, slopes, scale, window, softcap
_Options = tuple[Tensor | None, Tensor | None, float, int, float]


def _decode_reference(
    q_SHD: Tensor, caches: tuple[Tensor, Tensor], block_table_SN: Tensor, seq_lens_S: Tensor,
    options: _Options,
) -> Tensor:  # fmt: skip
    S, H, _ = q_SHD.shape
    window = options[3]
    out_SHE = q_SHD.new_zeros(S, H, caches[1].shape[-1])
    per_key = H + sum(cache[0, 0].numel() for cache in caches)
    max_len = int(seq_lens_S.max())
    for rows in _slices(0, S, _MAX_ELEMENTS // max(1, max_len * per_key)):
        lens = seq_lens_S[rows].long()
        positions = lens[:, None] - 1
        keys, values = (_gather(cache, block_table_SN[rows], positions, window) for cache in caches)
        attended = dense_attention(q_SHD[rows, None], keys, values, positions, lens, *options)
        out_SHE[rows] = torch.where(lens[:, None, None] > 0, attended[:, 0], 0)
    return out_SHE


def _prefill_reference(
    q_THD: Tensor, caches: tuple[Tensor, Tensor], block_table_SN: Tensor, query_start: Tensor,
    seq_lens_S: Tensor, options: _Options,
) -> Tensor:  # fmt: skip
    T, H, _ = q_THD.shape
    window = options[3]
    out_THE = q_THD.new_zeros(T, H, caches[1].shape[-1])
    starts = query_start.tolist()
    for s, length in enumerate(seq_lens_S.tolist()):
        begin = starts[s]
        end = starts[s + 1] if length else begin
        first_position = length - (starts[s + 1] - begin)
        lens, table = seq_lens_S[s : s + 1].long(), block_table_SN[s : s + 1]
        for rows in _slices(begin, end, _MAX_ELEMENTS // (max(1, length) * H)):
            tokens = torch.arange(rows.start, rows.stop, device=q_THD.device)[None]
            positions = tokens + (first_position - begin)
            keys, values = (_gather(cache, table, positions, window) for cache in caches)
            attended = dense_attention(q_THD[rows][None], keys, values, positions, lens, *options)
            out_THE[rows] = attended[0]
    return out_THE


def _slices(begin: int, end: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(first, min(end, first + size)) for first in range(begin, end, size)]


def _gather(
    cache_PBGD: Tensor, block_table_SN: Tensor, positions_SQ: Tensor, window: int
) -> Tensor:
    """Return the cached tokens [S, K, G, D] of each sequence, K being the longest.

    Tokens to which no query attends are replaced by one that is attended to, because their pages
    may belong to other sequences.
    """
    page_size = cache_PBGD.shape[1]
    last_S1 = positions_SQ[:, -1:].clamp(min=0)
    first_S1 = AttentionReach.decode(window).first_visible(positions_SQ[:, :1]).clamp(min=0)
    tokens_K = torch.arange(int(last_S1.max()) + 1, device=last_S1.device)
    tokens_SK = tokens_K.minimum(last_S1).maximum(first_S1)
    pages_SK = block_table_SN.long().gather(1, tokens_SK // page_size)
    slots_SK = pages_SK * page_size + tokens_SK % page_size
    return cache_PBGD.view(-1, *cache_PBGD.shape[2:])[slots_SK]


def dense_attention(
    q_SQHD: Tensor, k_SKGD: Tensor, v_SKGE: Tensor, positions_SQ: Tensor, lens_S: Tensor,
    sinks_H: Tensor | None, slopes_H: Tensor | None, scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """Return causal attention [S, Q, H, E] over dense keys and values, in plain PyTorch.

    Products and softmax are in float32; the result has the dtype of q.

    Args:
        positions_SQ: int64 positions of the Q queries of each sequence.
        lens_S: int64 numbers of tokens; keys from there on are masked.
        others: as in the module's docstring.
    """
    S, Q, H, D = q_SQHD.shape
    K, G = k_SKGD.shape[1:3]
    q_SGMD = q_SQHD.view(S, Q, G, H // G, D).permute(0, 2, 3, 1, 4)
    q_SGMD = q_SGMD.reshape(S, G, H // G * Q, D).float()
    scores = (q_SGMD @ k_SKGD.permute(0, 2, 3, 1).float() * scale).view(S, G, H // G, Q, K)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    keys_K = torch.arange(K, device=q_SQHD.device)
    if slopes_H is not None:
        distance_SQK = keys_K - positions_SQ[..., None]
        scores += slopes_H.float().view(1, G, H // G, 1, 1) * distance_SQK[:, None, None]
    mask_SQK = (keys_K <= positions_SQ[..., None]) & (keys_K < lens_S[:, None, None])
    mask_SQK &= keys_K >= AttentionReach.decode(window).first_visible(positions_SQ)[..., None]
    scores = scores.masked_fill(~mask_SQK[:, None, None], float("-inf"))
    if sinks_H is not None:
        sink = sinks_H.float().view(1, G, H // G, 1, 1).expand(S, G, H // G, Q, 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :K].reshape(S, G, H // G * Q, K)
    out = (weights @ v_SKGE.permute(0, 2, 1, 3).float()).view(S, G, H // G, Q, -1)
    return out.permute(0, 3, 1, 2, 4).reshape(S, Q, H, -1).to(q_SQHD.dtype)


def paged_attention_kernel(
    q_THD: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, block_table_SN: Tensor,
    query_start: Tensor, seq_lens_S: Tensor, split_counters: Tensor, sinks_H: Tensor | None,
    slopes_H: Tensor | None, scale: float, window: int, softcap: float, max_query_len: int,
) -> Tensor:  # fmt: skip
    """Return attention [T, H, E], with Triton.

    q may have any strides; D and E are at most 256; a page has at least 16 tokens.
    """
    options = (sinks_H, slopes_H, scale, window, softcap)
    if max_query_len == 1:
        return decode_attention(
            q_THD, k_cache_PBGD, v_cache_PBGE, block_table_SN, seq_lens_S, split_counters, *options
        )
    return prefill_attention(
        q_THD, k_cache_PBGD, v_cache_PBGE, block_table_SN, query_start, seq_lens_S, *options
    )


def paged_attention_cpu(
    q_THD: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, block_table_SN: Tensor,
    query_start: Tensor, seq_lens_S: Tensor, split_counters: Tensor, sinks_H: Tensor | None,
    slopes_H: Tensor | None, scale: float, window: int, softcap: float, max_query_len: int,
) -> Tensor:  # fmt: skip
    """Return attention [T, H, E], with C++ for float32 and by the reference for other dtypes."""
    if q_THD.dtype != torch.float32:
        return paged_attention_reference(
            q_THD, k_cache_PBGD, v_cache_PBGE, block_table_SN, query_start, seq_lens_S,
            split_counters, sinks_H, slopes_H, scale, window, softcap, max_query_len,
        )  # fmt: skip
    options = (sinks_H, slopes_H, scale, window, softcap)
    if max_query_len == 1:
        return cpu.decode_attention(
            q_THD, k_cache_PBGD, v_cache_PBGE, block_table_SN, seq_lens_S, *options
        )
    return cpu.prefill_attention(
        q_THD, k_cache_PBGD, v_cache_PBGE, block_table_SN, query_start, seq_lens_S, *options
    )


def _paged_attention_fake(
    q_THD: Tensor, k_cache: Tensor, v_cache_PBGE: Tensor, *_: object
) -> Tensor:
    return q_THD.new_empty(q_THD.shape[0], q_THD.shape[1], v_cache_PBGE.shape[-1])


paged_attention = define_op(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, "
    "Tensor query_start, Tensor seq_lens, Tensor split_counters, Tensor? sinks, Tensor? slopes, "
    "float scale, int window, float softcap, int max_query_len) -> Tensor",
    reference=paged_attention_reference,
    kernel=paged_attention_kernel,
    fake=_paged_attention_fake,
    cpu=paged_attention_cpu,
)
