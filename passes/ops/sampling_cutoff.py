"""The score below which top-k, top-p and min-p sampling drop the tokens of a row.

Shapes: S rows, V tokens of the vocabulary.

Scores are logits divided by the temperature: finite, or -inf for banned tokens. A row keeps the tokens whose score is
at least its cutoff, which is what transformers' TopKLogitsWarper, TopPLogitsWarper and MinPLogitsWarper leave when they
are applied in this order, save that tokens of equal score stay or go together:

- top-k keeps scores not below the k-th largest; 0, and V and more, are off.
- top-p, over the renormalised probabilities of what top-k kept, keeps a token while those above it have less than the
  mass p (nucleus sampling, arXiv:1904.09751); the largest score is always kept; 1 is off.
- min-p keeps probabilities of at least min_p times the largest (arXiv:2407.01082); 0 is off.

Each is a threshold, and the cutoff is the largest of the three; it is -inf where nothing is cut.

The kernel sorts nothing. "How many scores exceed t", and "what mass", fall as t grows, so bisection over the float32
values, which their bits put in order, ends at the exact threshold. To read the whole row a few times only, it begins
at a lower bound of the threshold, found by the same bisection over the maxima of each lane, which are some of the
scores and thus never exceed t in greater number or mass than all of them; and it goes on over a shortlist, a copy of
the scores not below that bound. Only where these are too many does it first bisect over the row until they are not.
The cutoff of a row that holds a NaN is NaN.
Sums run in a fixed order: a row's cutoff depends on that row alone. Mass is in float32, so which side of top-p a token
falls on is open where the mass above it is within about 1e-6 of p.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from passes.ops.library import define_op

BLOCK = 4096
SHORTLIST = 8192  # scores that the copy of a row has room for
LANES = 256  # the search over the lanes' maxima is close enough when it is down to so many


def sampling_cutoff_reference(
    scores_SV: Tensor, top_k_S: Tensor, top_p_S: Tensor, min_p_S: Tensor
) -> Tensor:
    """Plain PyTorch, by sorting. Run eagerly it waits for the device and leaves out the rows that ask for nothing."""
    if torch.compiler.is_compiling():
        return _cutoff(scores_SV, top_k_S, top_p_S, min_p_S)
    wanted = (top_k_S > 0) & (top_k_S < scores_SV.shape[1]) | (top_p_S < 1) | (min_p_S > 0)
    rows = wanted.nonzero()[:, 0]
    cutoff_S = scores_SV.new_full(scores_SV.shape[:1], float("-inf"))
    cutoff_S[rows] = _cutoff(scores_SV[rows], top_k_S[rows], top_p_S[rows], min_p_S[rows])
    return cutoff_S


def _cutoff(scores_SV: Tensor, top_k_S: Tensor, top_p_S: Tensor, min_p_S: Tensor) -> Tensor:
    """Probabilities are summed in float64."""
    V = scores_SV.shape[1]
    ordered_SV = scores_SV.sort(-1, descending=True).values
    peak_S = ordered_SV[:, 0]
    off_S = (top_k_S <= 0) | (top_k_S >= V)
    kth_S = ordered_SV.gather(1, top_k_S.clamp(1, V)[:, None] - 1)[:, 0].masked_fill(
        off_S, float("-inf")
    )

    # A row of nothing but -inf has no finite peak to subtract.
    weight_SV = (
        (ordered_SV - peak_S.clamp(min=torch.finfo(torch.float32).min)[:, None]).exp().double()
    )
    weight_SV = weight_SV.masked_fill(ordered_SV < kth_S[:, None], 0)
    total_SV = weight_SV.cumsum(-1)
    # The last token that top-p keeps: those before it have less than the mass p.
    kept_S = (
        (total_SV - weight_SV < top_p_S.double()[:, None] * total_SV[:, -1:]).sum(-1).clamp(min=1)
    )
    nucleus_S = ordered_SV.gather(1, kept_S[:, None] - 1)[:, 0].masked_fill(
        top_p_S >= 1, float("-inf")
    )
    return torch.maximum(kth_S, nucleus_S).maximum(peak_S + min_p_S.log())


@triton.jit
def _key(value):  # type: ignore[no-untyped-def]
    """The bits of a float32 as an int32 of the same order; _value is the inverse."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):  # type: ignore[no-untyped-def]
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _above(source, n, key, peak, MASS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many of n scores exceed the key's value, and their mass, the peak's being 1, if it is asked for."""
    value = _value(key)
    lane = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for base in range(0, n, BLOCK):
        score = tl.load(source + base + lane, mask=base + lane < n, other=float("-inf"))
        count += tl.where(score > value, 1, 0)
        if MASS:
            mass += tl.where(score > value, tl.exp(score - peak), 0.0)
    return tl.sum(count), tl.sum(mass) if MASS else 0.0


@triton.jit
def _search(source, n, low, high, peak, limit, stop, MASS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The smallest key in low..high whose value fewer than `limit` of n scores exceed, in number or mass; high is one.

    Returns the bounds between which it lies, and the mass above the upper one: the same key twice, or two with at most
    `stop` scores not below the lower one (in a search by mass: and not above the upper one).
    """
    left = tl.full([], n, tl.int32)
    right = tl.full([], 0, tl.int32)
    over = tl.full([], 0.0, tl.float32)
    while (low < high) & (left - right > stop):
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without overflow
        count, mass = _above(source, n, middle, peak, MASS, BLOCK)
        few = (mass if MASS else count.to(tl.float32)) < limit
        high = tl.where(few, middle, high)
        low = tl.where(few, low, middle + 1)
        left = tl.where(few, left, count)
        if MASS:
            right = tl.where(few, count, right)
            over = tl.where(few, mass, over)
    return low, high, over


@triton.jit
def _shorten(shortlist, row, V, low, high, SHORTLIST: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy the scores between two keys, lane after lane, if there is room; returns how many there are."""
    lane = tl.arange(0, BLOCK)
    held = tl.zeros([BLOCK], tl.int32)
    for base in range(0, V, BLOCK):
        score = tl.load(row + base + lane, mask=base + lane < V, other=float("nan"))
        held += ((score >= _value(low)) & (score <= _value(high))).to(tl.int32)
    n = tl.sum(held)
    if n <= SHORTLIST:
        slot = tl.cumsum(held, 0) - held
        tl.debug_barrier()  # what the shortlist held has been read
        for base in range(0, V, BLOCK):
            score = tl.load(row + base + lane, mask=base + lane < V, other=float("nan"))
            taken = (score >= _value(low)) & (score <= _value(high))
            tl.store(shortlist + slot, score, mask=taken)
            slot += taken.to(tl.int32)
        tl.debug_barrier()
    return n


@triton.jit
def _sampling_cutoff_kernel(  # type: ignore[no-untyped-def]
    cutoff, scores, shortlists, top_k, top_p, min_p, stride_s, k_stride, p_stride, m_stride, V,
    LANES: tl.constexpr, SHORTLIST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program finds the cutoff of one row, and reads none of it when the row asks for nothing."""
    s = tl.program_id(0).to(tl.int64)
    k = tl.load(top_k + s * k_stride)
    p = tl.load(top_p + s * p_stride)
    ratio = tl.load(min_p + s * m_stride)
    by_count = (k > 0) & (k < V)
    by_mass = p < 1.0
    result = float("-inf")
    if by_count | by_mass | (ratio > 0.0):
        row = scores + s * stride_s
        lane = tl.arange(0, BLOCK)
        peaks = tl.full([BLOCK], float("-inf"), tl.float32)
        for base in range(0, V, BLOCK):
            score = tl.load(row + base + lane, mask=base + lane < V, other=float("-inf"))
            peaks = tl.maximum(peaks, score, propagate_nan=tl.PropagateNan.ALL)
        has_nan = tl.max((peaks != peaks).to(tl.int32)) > 0
        peak = tl.max(peaks)
        if has_nan:
            result = float("nan")
        elif by_count | by_mass:
            shortlist = shortlists + s * SHORTLIST
            tl.store(shortlist + lane, peaks)
            tl.debug_barrier()
            lowest = _key(tl.full([], float("-inf"), tl.float32))
            high = _key(peak)
            limit = k.to(tl.float32)
            if by_count:
                low = _search(shortlist, BLOCK, lowest, high, peak, limit, LANES, False, BLOCK)[0]
            else:
                total = _above(row, V, lowest, peak, True, BLOCK)[1]
                limit = p * total
                low = _search(shortlist, BLOCK, lowest, high, peak, limit, LANES, True, BLOCK)[0]
                # Another lower bound: V tokens, each less likely than this, have less than the mass that top-p drops.
                low = tl.minimum(tl.maximum(low, _key(peak + tl.log((1.0 - p) * total / V))), high)
            n = _shorten(shortlist, row, V, low, high, SHORTLIST, BLOCK)
            if n > SHORTLIST:  # the bound was far off: a few steps over the whole row, and again
                if by_count:
                    low = _search(row, V, low, high, peak, limit, SHORTLIST, False, BLOCK)[0]
                else:
                    low, high, over = _search(
                        row, V, low, high, peak, limit, SHORTLIST, True, BLOCK
                    )
                    limit -= over
                n = _shorten(shortlist, row, V, low, high, SHORTLIST, BLOCK)
            source = shortlist
            if n > SHORTLIST:  # more than that are kept, or are equal
                source = row
                n = V
            if by_count:
                low = _search(source, n, low, high, peak, limit, 0, False, BLOCK)[0]
                total = _above(source, n, tl.maximum(low - 1, lowest), peak, True, BLOCK)[1]
                limit = p * total
            if by_mass:
                low = _search(source, n, low, high, peak, limit, 0, True, BLOCK)[0]
            result = _value(low)
        if (ratio > 0.0) & (has_nan == 0):
            result = tl.maximum(result, peak + tl.log(ratio))
    tl.store(cutoff + s, result)


def sampling_cutoff_kernel(
    scores_SV: Tensor, top_k_S: Tensor, top_p_S: Tensor, min_p_S: Tensor
) -> Tensor:
    """Triton. Rows of scores, and the parameters, may have any stride; V up to 2 ** 24. The shortlists take 32 KiB a row."""
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
