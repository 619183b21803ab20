"""Log-probabilities of the chosen token and of the most likely tokens of each row.

Shape suffixes:
    S: rows
    V: tokens of the vocabulary
    C: columns, max_count + 1

Arguments of the op:

- `logits` [S, V] are float32, float16 or bfloat16, before temperature.
- `chosen` [S] int64 are the ids of the chosen tokens.
- `count` [S] int64 is the number of most likely tokens to return, 0 to `max_count`, or -1 for a
  row for which nothing is to be returned.
- `max_count` is at most V.

Results are `values` [S, C] float32 and `ids` [S, C] int64. Column 0 holds the log-probability of
the chosen token and its rank, which is 1 plus the number of larger logits. Columns 1 to `count`
hold the log-probabilities and ids of the largest logits in descending order, equal ones by
ascending id. Other columns are zeros. Computation is in float32.

The kernel reads a row once. Each lane keeps an online sum of exponentials (online softmax,
arXiv:1805.02867) and its largest logit. The top tokens are then found one by one as the largest of
all lanes, after which the lane of the found token is searched for its next one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from passes.ops.library import define_op

BLOCK = 4096
ROWS = 16  # rows that the reference converts to float32 at once


def top_logprobs_reference(
    logits_SV: Tensor, chosen_S: Tensor, count_S: Tensor, max_count: int
) -> tuple[Tensor, Tensor]:
    """Return values and ids, in plain PyTorch, by sorting.

    In eager mode it synchronizes with the device and skips rows whose count is -1.
    """
    if torch.compiler.is_compiling():
        return _top_logprobs(logits_SV, chosen_S, count_S, max_count)
    values_SC = logits_SV.new_zeros(len(logits_SV), max_count + 1, dtype=torch.float32)
    ids_SC = torch.zeros_like(values_SC, dtype=torch.int64)
    for rows in (count_S >= 0).nonzero()[:, 0].split(ROWS):
        values_SC[rows], ids_SC[rows] = _top_logprobs(
            logits_SV[rows], chosen_S[rows], count_S[rows], max_count
        )
    return values_SC, ids_SC


def _top_logprobs(
    logits_SV: Tensor, chosen_S: Tensor, count_S: Tensor, max_count: int
) -> tuple[Tensor, Tensor]:
    logprobs_SV = logits_SV.float().log_softmax(-1)
    sorted_SV = logits_SV.sort(dim=-1, descending=True, stable=True).indices
    top_SM = sorted_SV[:, :max_count]
    tokens_SC = torch.cat([chosen_S[:, None], top_SM], -1)
    rank_S1 = 1 + (logits_SV > logits_SV.gather(1, chosen_S[:, None])).sum(-1, keepdim=True)
    unused_SC = torch.arange(max_count + 1, device=count_S.device) > count_S[:, None]
    values_SC = logprobs_SV.gather(1, tokens_SC).masked_fill(unused_SC, 0)
    return values_SC, torch.cat([rank_S1, top_SM], -1).masked_fill(unused_SC, 0)


@triton.jit
def _top_logprobs_kernel(  # type: ignore[no-untyped-def]
    values, ids, logits, chosen, counts,
    stride_s, stride_v, chosen_stride, count_stride, V, max_count,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Process one row; a row whose count is -1 is not read. DEPTH is the logits of a lane."""
    # Zeros in the columns past the count.
    s = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + s * count_stride).to(tl.int32)
    values += s * (max_count + 1)
    ids += s * (max_count + 1)
    column = tl.arange(0, COLUMNS)
    is_unused = (column > count) & (column <= max_count)
    tl.store(values + column, tl.zeros([COLUMNS], tl.float32), mask=is_unused)
    tl.store(ids + column, tl.zeros([COLUMNS], tl.int64), mask=is_unused)
    if count < 0:
        return

    # One pass over the row: sum of exponentials and largest logit of each lane, and the rank.
    logits += s * stride_s
    lane = tl.arange(0, BLOCK)
    chosen_logit = tl.load(logits + tl.load(chosen + s * chosen_stride) * stride_v).to(tl.float32)
    # The first maximum is finite, so that a lane of -inf alone subtracts no infinities.
    m_i = tl.full([BLOCK], -3e38, tl.float32)
    l_i = tl.zeros([BLOCK], tl.float32)
    larger = tl.zeros([BLOCK], tl.int32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_token = tl.zeros([BLOCK], tl.int32) + V
    for base in range(0, V, BLOCK):
        token = base + lane
        logit = tl.load(logits + token * stride_v, mask=token < V, other=float("nan")).to(
            tl.float32
        )
        is_better = (logit > best) | ((logit == best) & (best_token == V))
        best = tl.where(is_better, logit, best)
        best_token = tl.where(is_better, token, best_token)
        m_new = tl.maximum(m_i, best)
        l_i = l_i * tl.exp(m_i - m_new) + tl.where(token < V, tl.exp(logit - m_new), 0.0)
        m_i = m_new
        larger += tl.where(logit > chosen_logit, 1, 0)
    max_logit = tl.max(m_i)
    log_sum = tl.log(tl.sum(l_i * tl.exp(m_i - max_logit)))
    tl.store(values, chosen_logit - max_logit - log_sum)
    tl.store(ids, tl.sum(larger).to(tl.int64) + 1)

    # The top tokens, one at a time.
    for i in range(1, count + 1):
        top = tl.max(best)
        top_token = tl.min(tl.where(best == top, best_token, V))
        tl.store(values + i, top - max_logit - log_sum)
        # V if all logits are NaN; the clamp makes that a valid id.
        tl.store(ids + i, tl.minimum(top_token, V - 1).to(tl.int64))
        # Search the lane of the token for its next one.
        token = top_token % BLOCK + tl.arange(0, DEPTH) * BLOCK
        logit = tl.load(logits + token * stride_v, mask=token < V, other=float("nan")).to(
            tl.float32
        )
        is_after = (logit < top) | ((logit == top) & (token > top_token))
        following = tl.max(tl.where(is_after, logit, float("-inf")))
        following_token = tl.min(tl.where(is_after & (logit == following), token, V))
        best = tl.where(lane == top_token % BLOCK, following, best)
        best_token = tl.where(lane == top_token % BLOCK, following_token, best_token)


def top_logprobs_kernel(
    logits_SV: Tensor, chosen_S: Tensor, count_S: Tensor, max_count: int
) -> tuple[Tensor, Tensor]:
    """Return values and ids, with Triton; arguments may have any strides."""
    S, V = logits_SV.shape
    values_SC = logits_SV.new_empty(S, max_count + 1, dtype=torch.float32)
    ids_SC = logits_SV.new_empty(S, max_count + 1, dtype=torch.int64)
    depth = triton.cdiv(V, BLOCK)
    _top_logprobs_kernel[(S,)](
        values_SC, ids_SC, logits_SV, chosen_S, count_S,
        *logits_SV.stride(), chosen_S.stride(0), count_S.stride(0), V, max_count,
        COLUMNS=triton.next_power_of_2(max_count + 1), DEPTH=triton.next_power_of_2(depth),
        BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return values_SC, ids_SC


def _top_logprobs_fake(
    logits_SV: Tensor, chosen_S: Tensor, count_S: Tensor, max_count: int
) -> tuple[Tensor, Tensor]:
    shape = (logits_SV.shape[0], max_count + 1)
    values_SC = logits_SV.new_empty(shape, dtype=torch.float32)
    ids_SC = logits_SV.new_empty(shape, dtype=torch.int64)
    return values_SC, ids_SC


top_logprobs = define_op(
    "top_logprobs(Tensor logits, Tensor chosen, Tensor count, int max_count) "
    "-> (Tensor values, Tensor ids)",
    reference=top_logprobs_reference,
    kernel=top_logprobs_kernel,
    fake=_top_logprobs_fake,
)
