"""The score below which top-k, top-p and min-p sampling drop the tokens of a row.

Shape suffixes:
    S: rows
    V: tokens of the vocabulary

Scores are logits divided by the temperature: finite, or -inf for banned tokens. A row keeps the
tokens whose score is at least its cutoff. These are the tokens that transformers' TopKLogitsWarper,
TopPLogitsWarper and MinPLogitsWarper keep when applied in this order, except that tokens of equal
score are kept or dropped together:

- top-k keeps scores not below the k-th largest; 0, and values of at least V, disable it.
- top-p sorts the tokens that top-k kept by their renormalized probability and keeps a token while
  those before it have less than the mass p (nucleus sampling, arXiv:1904.09751). The largest score
  is always kept; 1 disables it.
- min-p keeps probabilities of at least min_p times the largest (arXiv:2407.01082); 0 disables it.

Each is a threshold, and the cutoff is the largest of the three; it is -inf if all are disabled.
The cutoff of a row that holds NaN is NaN.

The kernel does not sort. The number of scores above a threshold t, and their mass, decrease in t,
so bisection over the float32 values, whose bits are mapped to integers of the same order, ends at
the exact threshold. To read a row few times:

1. A bisection over the maxima of each lane gives a lower bound of the threshold: the maxima are
   some of the scores, so no more of them exceed t than of all scores.
2. The scores not below the bound are copied to a shortlist. If they do not fit, a bisection over
   the row, which stops as soon as they do, raises the bound first.
3. The bisection continues over the shortlist.

Sums run in a fixed order, so a row's cutoff depends on that row alone. Mass is summed in float32:
a token of which the mass before it is within about 1e-6 of p may be kept or dropped.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from passes.ops.library import define_op

BLOCK = 4096
SHORTLIST = 8192  # capacity of a row's shortlist
LANES = 256  # the bisection over the lanes' maxima stops when at most so many are left


def sampling_cutoff_reference(
    scores_SV: Tensor, top_k_S: Tensor, top_p_S: Tensor, min_p_S: Tensor
) -> Tensor:
    """Return the cutoffs [S] float32, in plain PyTorch, by sorting.

    In eager mode it synchronizes with the device and skips rows in which all three are disabled.

    Args:
        scores_SV: float32 scores.
        top_k_S: int64.
        top_p_S: float32.
        min_p_S: float32.
    """
    if torch.compiler.is_compiling():
        return _cutoff(scores_SV, top_k_S, top_p_S, min_p_S)
    enabled = (top_k_S > 0) & (top_k_S < scores_SV.shape[1]) | (top_p_S < 1) | (min_p_S > 0)
    rows = enabled.nonzero()[:, 0]
    cutoff_S = scores_SV.new_full(scores_SV.shape[:1], float("-inf"))
    cutoff_S[rows] = _cutoff(scores_SV[rows], top_k_S[rows], top_p_S[rows], min_p_S[rows])
    return cutoff_S


def _cutoff(scores_SV: Tensor, top_k_S: Tensor, top_p_S: Tensor, min_p_S: Tensor) -> Tensor:
    """Return the cutoffs; mass is summed in float64."""
    V = scores_SV.shape[1]
    sorted_SV = scores_SV.sort(-1, descending=True).values
    max_S = sorted_SV[:, 0]
    disabled_S = (top_k_S <= 0) | (top_k_S >= V)
    kth_S = sorted_SV.gather(1, top_k_S.clamp(1, V)[:, None] - 1)[:, 0]
    kth_S = kth_S.masked_fill(disabled_S, float("-inf"))

    # The clamp keeps a row of -inf alone from subtracting infinities.
    finite_max_S = max_S.clamp(min=torch.finfo(torch.float32).min)
    mass_SV = (sorted_SV - finite_max_S[:, None]).exp().double()
    mass_SV = mass_SV.masked_fill(sorted_SV < kth_S[:, None], 0)
    cumulative_SV = mass_SV.cumsum(-1)
    # top-p keeps the tokens before which there is less than the mass p.
    below_p_SV = cumulative_SV - mass_SV < top_p_S.double()[:, None] * cumulative_SV[:, -1:]
    num_kept_S = below_p_SV.sum(-1).clamp(min=1)
    nucleus_S = sorted_SV.gather(1, num_kept_S[:, None] - 1)[:, 0]
    nucleus_S = nucleus_S.masked_fill(top_p_S >= 1, float("-inf"))
    return torch.maximum(kth_S, nucleus_S).maximum(max_S + min_p_S.log())


@triton.jit
def _key(value):  # type: ignore[no-untyped-def]
    """Map float32 to int32 of the same order; `_value` is the inverse."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):  # type: ignore[no-untyped-def]
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _above(  # type: ignore[no-untyped-def]
    source, n, key, max_score, MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """Return how many of n scores exceed the key's value, and with MASS their mass, else 0.

    The mass of `max_score` is 1.
    """
    value = _value(key)
    lane = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for base in range(0, n, BLOCK):
        score = tl.load(source + base + lane, mask=base + lane < n, other=float("-inf"))
        count += tl.where(score > value, 1, 0)
        if MASS:
            mass += tl.where(score > value, tl.exp(score - max_score), 0.0)
    return tl.sum(count), tl.sum(mass) if MASS else 0.0


@triton.jit
def _search(  # type: ignore[no-untyped-def]
    source, n, low, high, max_score, limit, stop, MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """Bisect for the smallest key in low..high above which n scores have less than `limit`.

    That is, fewer than `limit` scores exceed its value, or with MASS, the scores that exceed it
    have less mass than `limit`. `high` must be such a key.

    Returns low and high bounds of the key and the mass above the high one. The bounds are equal,
    or at most `stop` scores are not below the low one (with MASS: and not above the high one).
    """
    above_low = tl.full([], n, tl.int32)
    above_high = tl.full([], 0, tl.int32)
    mass_above_high = tl.full([], 0.0, tl.float32)
    while (low < high) & (above_low - above_high > stop):
        middle = (low & high) + ((low ^ high) >> 1)  # mean, rounded down, without overflow
        count, mass = _above(source, n, middle, max_score, MASS, BLOCK)
        is_less = (mass if MASS else count.to(tl.float32)) < limit
        high = tl.where(is_less, middle, high)
        low = tl.where(is_less, low, middle + 1)
        above_low = tl.where(is_less, above_low, count)
        if MASS:
            above_high = tl.where(is_less, count, above_high)
            mass_above_high = tl.where(is_less, mass, mass_above_high)
    return low, high, mass_above_high


@triton.jit
def _fill_shortlist(  # type: ignore[no-untyped-def]
    shortlist, row, V, low, high, SHORTLIST: tl.constexpr, BLOCK: tl.constexpr
):
    """Copy the scores between two keys, lane by lane, if they fit; return their number."""
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.int32)
    for base in range(0, V, BLOCK):
        score = tl.load(row + base + lane, mask=base + lane < V, other=float("nan"))
        counts += ((score >= _value(low)) & (score <= _value(high))).to(tl.int32)
    n = tl.sum(counts)
    if n <= SHORTLIST:
        slot = tl.cumsum(counts, 0) - counts
        tl.debug_barrier()  # all threads have read the previous content
        for base in range(0, V, BLOCK):
            score = tl.load(row + base + lane, mask=base + lane < V, other=float("nan"))
            is_listed = (score >= _value(low)) & (score <= _value(high))
            tl.store(shortlist + slot, score, mask=is_listed)
            slot += is_listed.to(tl.int32)
        tl.debug_barrier()
    return n


@triton.jit
def _sampling_cutoff_kernel(  # type: ignore[no-untyped-def]
    cutoff, scores, shortlists, top_k, top_p, min_p, stride_s, k_stride, p_stride, m_stride, V,
    LANES: tl.constexpr, SHORTLIST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Find the cutoff of one row; a row in which all three are disabled is not read."""
    s = tl.program_id(0).to(tl.int64)
    k = tl.load(top_k + s * k_stride)
    p = tl.load(top_p + s * p_stride)
    ratio = tl.load(min_p + s * m_stride)
    by_count = (k > 0) & (k < V)
    by_mass = p < 1.0
    result = float("-inf")
    if by_count | by_mass | (ratio > 0.0):
        # Maximum of each lane, and of the row.
        row = scores + s * stride_s
        lane = tl.arange(0, BLOCK)
        lane_max = tl.full([BLOCK], float("-inf"), tl.float32)
        for base in range(0, V, BLOCK):
            score = tl.load(row + base + lane, mask=base + lane < V, other=float("-inf"))
            lane_max = tl.maximum(lane_max, score, propagate_nan=tl.PropagateNan.ALL)
        has_nan = tl.max((lane_max != lane_max).to(tl.int32)) > 0
        max_score = tl.max(lane_max)
        if has_nan:
            result = float("nan")
        elif by_count | by_mass:
            # A lower bound: bisection over the lanes' maxima.
            shortlist = shortlists + s * SHORTLIST
            tl.store(shortlist + lane, lane_max)
            tl.debug_barrier()
            lowest = _key(tl.full([], float("-inf"), tl.float32))
            high = _key(max_score)
            limit = k.to(tl.float32)
            if by_count:
                low = _search(
                    shortlist, BLOCK, lowest, high, max_score, limit, LANES, False, BLOCK
                )[0]
            else:
                total = _above(row, V, lowest, max_score, True, BLOCK)[1]
                limit = p * total
                low = _search(shortlist, BLOCK, lowest, high, max_score, limit, LANES, True, BLOCK)[
                    0
                ]
                # Another bound: V tokens, each of less mass than this, have less than top-p drops.
                dropped = max_score + tl.log((1.0 - p) * total / V)
                low = tl.minimum(tl.maximum(low, _key(dropped)), high)

            # The shortlist; if the bound is too low for it, raise that over the whole row.
            n = _fill_shortlist(shortlist, row, V, low, high, SHORTLIST, BLOCK)
            if n > SHORTLIST:
                if by_count:
                    low = _search(row, V, low, high, max_score, limit, SHORTLIST, False, BLOCK)[0]
                else:
                    low, high, mass_above_high = _search(
                        row, V, low, high, max_score, limit, SHORTLIST, True, BLOCK
                    )
                    limit -= mass_above_high
                n = _fill_shortlist(shortlist, row, V, low, high, SHORTLIST, BLOCK)
            source = shortlist
            if n > SHORTLIST:  # more tokens than that are kept, or are equal
                source = row
                n = V

            # The exact threshold: of top-k, then of top-p among the tokens that top-k kept.
            if by_count:
                low = _search(source, n, low, high, max_score, limit, 0, False, BLOCK)[0]
                total = _above(source, n, tl.maximum(low - 1, lowest), max_score, True, BLOCK)[1]
                limit = p * total
            if by_mass:
                low = _search(source, n, low, high, max_score, limit, 0, True, BLOCK)[0]
            result = _value(low)
        if (ratio > 0.0) & (has_nan == 0):
            result = tl.maximum(result, max_score + tl.log(ratio))
    tl.store(cutoff + s, result)


def sampling_cutoff_kernel(
    scores_SV: Tensor, top_k_S: Tensor, top_p_S: Tensor, min_p_S: Tensor
) -> Tensor:
    """Return the cutoffs [S] float32, with Triton.

    The parameters and the rows of scores may have any strides; V is at most 2 ** 24. Shortlists
    take 32 KiB per row.
    """
    S, V = scores_SV.shape
    if scores_SV.stride(1) != 1:
        scores_SV = scores_SV.contiguous()
    cutoff_S = scores_SV.new_empty(S)
    _sampling_cutoff_kernel[(S,)](
        cutoff_S, scores_SV, scores_SV.new_empty(S, SHORTLIST), top_k_S, top_p_S, min_p_S,
        scores_SV.stride(0), top_k_S.stride(0), top_p_S.stride(0), min_p_S.stride(0), V,
        LANES=LANES, SHORTLIST=SHORTLIST, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return cutoff_S


def _sampling_cutoff_fake(scores_SV: Tensor, *_: Tensor) -> Tensor:
    return scores_SV.new_empty(scores_SV.shape[0])


sampling_cutoff = define_op(
    "sampling_cutoff(Tensor scores, Tensor top_k, Tensor top_p, Tensor min_p) -> Tensor",
    reference=sampling_cutoff_reference,
    kernel=sampling_cutoff_kernel,
    fake=_sampling_cutoff_fake,
)
