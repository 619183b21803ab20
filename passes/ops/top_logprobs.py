"""The log-probabilities that requests ask to see: that of the chosen token and those of the most likely ones.

Shapes: S rows, V tokens of the vocabulary, C = most + 1 columns.

`logits_SV` are float32, bfloat16 or float16, before temperature; `chosen_S` are int64 token ids; `count_S` (int64) says
how many of the most likely tokens a row wants, up to `most`, which is at most V; -1 asks for nothing at all. Column 0
of `values_SC` (float32) is the log-probability of the chosen token, and that of `ids_SC` (int64) its rank: 1 and the
number of tokens whose logit is larger. Columns 1 to count are the log-probabilities and ids of the tokens of the largest
logits, in descending order, equal ones by ascending id. The rest is zeros. All is computed in float32.

The kernel reads a row once: it takes log-sum-exp (online softmax, arXiv:1805.02867) and the largest logit of each lane.
The top tokens are then won in a tournament of the lanes, in which the lane of each winner sends its next one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from passes.ops.library import define_op

BLOCK = 4096
ROWS = 16  # that the reference holds in float32 at once


def top_logprobs_reference(
    logits_SV: Tensor, chosen_S: Tensor, count_S: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, by sorting. Run eagerly it waits for the device and leaves out the rows that ask for nothing."""
    if torch.compiler.is_compiling():
        return _top_logprobs(logits_SV, chosen_S, count_S, most)
    values_SC = logits_SV.new_zeros(len(logits_SV), most + 1, dtype=torch.float32)
    ids_SC = torch.zeros_like(values_SC, dtype=torch.int64)
    for rows in (count_S >= 0).nonzero()[:, 0].split(ROWS):
        values_SC[rows], ids_SC[rows] = _top_logprobs(
            logits_SV[rows], chosen_S[rows], count_S[rows], most
        )
    return values_SC, ids_SC


def _top_logprobs(
    logits_SV: Tensor, chosen_S: Tensor, count_S: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    logprobs_SV = logits_SV.float().log_softmax(-1)
    top_SM = logits_SV.sort(dim=-1, descending=True, stable=True).indices[:, :most]
    tokens_SC = torch.cat([chosen_S[:, None], top_SM], -1)
    rank_S1 = 1 + (logits_SV > logits_SV.gather(1, chosen_S[:, None])).sum(-1, keepdim=True)
    unwanted_SC = torch.arange(most + 1, device=count_S.device) > count_S[:, None]
    values_SC = logprobs_SV.gather(1, tokens_SC).masked_fill(unwanted_SC, 0)
    return values_SC, torch.cat([rank_S1, top_SM], -1).masked_fill(unwanted_SC, 0)


@triton.jit
def _top_logprobs_kernel(  # type: ignore[no-untyped-def]
    values, ids, logits, chosen, count, stride_s, stride_v, chosen_stride, count_stride, V, most,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row, which is not read when it asks for nothing."""
    s = tl.program_id(0).to(tl.int64)
    wanted = tl.load(count + s * count_stride).to(tl.int32)
    values += s * (most + 1)
    ids += s * (most + 1)
    column = tl.arange(0, COLUMNS)
    unwanted = (column > wanted) & (column <= most)
    tl.store(values + column, tl.zeros([COLUMNS], tl.float32), mask=unwanted)
    tl.store(ids + column, tl.zeros([COLUMNS], tl.int64), mask=unwanted)
    if wanted < 0:
        return

    logits += s * stride_s
    lane = tl.arange(0, BLOCK)
    choice = tl.load(logits + tl.load(chosen + s * chosen_stride) * stride_v).to(tl.float32)
    # Finite, so that lanes that have seen nothing but -inf subtract no infinities.
    peaks = tl.full([BLOCK], -3e38, tl.float32)
    totals = tl.zeros([BLOCK], tl.float32)
    larger = tl.zeros([BLOCK], tl.int32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_token = tl.zeros([BLOCK], tl.int32) + V
    for base in range(0, V, BLOCK):
        token = base + lane
        logit = tl.load(logits + token * stride_v, mask=token < V, other=float("nan")).to(
            tl.float32
        )
        better = (logit > best) | ((logit == best) & (best_token == V))
        best = tl.where(better, logit, best)
        best_token = tl.where(better, token, best_token)
        new_peaks = tl.maximum(peaks, best)
        totals = totals * tl.exp(peaks - new_peaks) + tl.where(
            token < V, tl.exp(logit - new_peaks), 0.0
        )
        peaks = new_peaks
        larger += tl.where(logit > choice, 1, 0)
    peak = tl.max(peaks)
    log_total = tl.log(tl.sum(totals * tl.exp(peaks - peak)))
    tl.store(values, choice - peak - log_total)
    tl.store(ids, tl.sum(larger).to(tl.int64) + 1)

    for i in range(1, wanted + 1):
        top = tl.max(best)
        top_token = tl.min(tl.where(best == top, best_token, V))
        tl.store(values + i, top - peak - log_total)
        tl.store(
            ids + i, tl.minimum(top_token, V - 1).to(tl.int64)
        )  # V where all are NaN; an id is an id even so
        # The next one of the lane that it came from.
        token = top_token % BLOCK + tl.arange(0, DEPTH) * BLOCK
        logit = tl.load(logits + token * stride_v, mask=token < V, other=float("nan")).to(
            tl.float32
        )
        after = (logit < top) | ((logit == top) & (token > top_token))
        following = tl.max(tl.where(after, logit, float("-inf")))
        following_token = tl.min(tl.where(after & (logit == following), token, V))
        best = tl.where(lane == top_token % BLOCK, following, best)
        best_token = tl.where(lane == top_token % BLOCK, following_token, best_token)


def top_logprobs_kernel(
    logits_SV: Tensor, chosen_S: Tensor, count_S: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """Triton. The arguments may have any strides."""
    S, V = logits_SV.shape
    values_SC = logits_SV.new_empty(S, most + 1, dtype=torch.float32)
    ids_SC = logits_SV.new_empty(S, most + 1, dtype=torch.int64)
    _top_logprobs_kernel[(S,)](
        values_SC, ids_SC, logits_SV, chosen_S, count_S, *logits_SV.stride(), chosen_S.stride(0), count_S.stride(0), V, most,
        COLUMNS=triton.next_power_of_2(most + 1), DEPTH=triton.next_power_of_2(triton.cdiv(V, BLOCK)), BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return values_SC, ids_SC


def _top_logprobs_fake(
    logits_SV: Tensor, chosen_S: Tensor, count_S: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    shape = (logits_SV.shape[0], most + 1)
    return logits_SV.new_empty(shape, dtype=torch.float32), logits_SV.new_empty(
        shape, dtype=torch.int64
    )


top_logprobs = define_op(
    "top_logprobs(Tensor logits, Tensor chosen, Tensor count, int most) -> (Tensor values, Tensor ids)",
    reference=top_logprobs_reference,
    kernel=top_logprobs_kernel,
    fake=_top_logprobs_fake,
)
