"""The sampling ops against their references, against transformers' warpers, and against log_softmax and topk."""

import itertools

import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from passes.ops.sampling_cutoff import (
    SHORTLIST,
    sampling_cutoff,
    sampling_cutoff_kernel,
    sampling_cutoff_reference,
)
from passes.ops.top_logprobs import top_logprobs, top_logprobs_kernel, top_logprobs_reference
from tests.conftest import DEVICE

CUDA = DEVICE.type == "cuda"
INF = float("inf")
CUTOFFS = [sampling_cutoff_reference, sampling_cutoff_kernel]
LOGPROBS = [top_logprobs_reference, top_logprobs_kernel]
# Every mix of top-k (off, few, more than a block's lanes, more than there are), top-p and min-p; the interpreter, being slow,
# sees a part of them, in which each setting meets most others.
MIXES = list(
    itertools.product([0, 1, 40, 4500, 10**6], [1.0, 1e-6, 0.5, 0.95, 0.999], [0.0, 0.05, 1.0])
)[:: 1 if CUDA else 4]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def parameters(mixes: list[tuple[int, float, float]]) -> tuple[Tensor, Tensor, Tensor]:
    top_k, top_p, min_p = zip(*mixes, strict=True)
    return (
        torch.tensor(top_k, device=DEVICE),
        torch.tensor(top_p, device=DEVICE),
        torch.tensor(min_p, device=DEVICE),
    )


def strided(x: Tensor) -> Tensor:
    """The same values, with others between them."""
    return torch.stack([x, x.roll(1), x.roll(2)], 1)[:, 0]


def warped(scores_V: Tensor, top_k: int, top_p: float, min_p: float, nudge: float) -> Tensor:
    """What transformers keeps of one row, were its thresholds a little lower (nudge 1) or higher (-1)."""
    top_p = min(max(top_p + nudge * 2e-6, 0.0), 1.0) if top_p < 1 else 1.0
    min_p = min(min_p * (1 - nudge * 1e-5), 1.0)
    warpers = [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    scores_1V = scores_V[None]
    for warper in warpers:
        scores_1V = warper(None, scores_1V)
    return scores_1V[0] > -INF


def kept(operation, scores_SV: Tensor, mixes: list[tuple[int, float, float]]) -> Tensor:  # type: ignore[no-untyped-def]
    cutoff_S = operation(scores_SV, *parameters(mixes))
    assert cutoff_S.dtype == torch.float32
    return (scores_SV >= cutoff_S[:, None]) & (scores_SV > -INF)


# A spread of 0.5 is flat: no lane stands out, and a vocabulary of more than the shortlist has to be searched as a whole.
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("vocabulary", "spread"),
    [
        (300, 3.0),
        (5000, 3.0),
        (9001, 0.5),
        *([(50257, 2.0), (151936, 0.5), (262144, 3.0)] if CUDA else []),
    ],
)
@pytest.mark.parametrize("operation", CUTOFFS)
def test_cutoff_keeps_what_the_warpers_keep(operation, vocabulary, spread) -> None:  # type: ignore[no-untyped-def]
    scores_SV = spread * rand(len(MIXES), vocabulary)
    scores_SV[::2, :250] = -INF
    actual_SV = kept(operation, scores_SV, MIXES)
    for scores_V, actual_V, mix in zip(scores_SV, actual_SV, MIXES, strict=True):
        least_V, most_V = warped(scores_V, *mix, nudge=-1), warped(scores_V, *mix, nudge=1)
        assert not (least_V & ~actual_V).any(), mix
        assert not (actual_V & ~most_V).any(), mix
        assert actual_V.any(), mix


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [300, 5000, *([151936] if CUDA else [])])
def test_cutoff_kernel_is_the_reference(vocabulary) -> None:  # type: ignore[no-untyped-def]
    """To the last bit where top-k or top-p cuts, for then the cutoff is one of the scores; also on scores full of ties."""
    mixes = list(itertools.product([0, 1, 40, 4500], [1.0, 0.5, 0.95], [0.0])) * 2
    scores_SV = 4 * rand(len(mixes), vocabulary)
    scores_SV[len(mixes) // 2 :] = scores_SV[len(mixes) // 2 :].round()
    expected_S, actual_S = (operation(scores_SV, *parameters(mixes)) for operation in CUTOFFS)
    assert torch.equal(actual_S, expected_S)


@pytest.mark.gpu
@pytest.mark.parametrize("operation", CUTOFFS)
def test_cutoff_keeps_all_of_a_tie(operation) -> None:  # type: ignore[no-untyped-def]
    scores_V = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0, -0.0, -1.0, -INF], device=DEVICE)
    mixes = [
        (2, 1.0, 0.0),
        (0, 0.5, 0.0),
        (5, 1.0, 0.0),
        (7, 1.0, 0.0),
        (3, 0.9, 0.0),
        (0, 1.0, 1.0),
    ]
    counts = kept(operation, scores_V.expand(len(mixes), -1), mixes).sum(-1)
    assert counts.tolist() == [4, 4, 6, 7, 4, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("operation", CUTOFFS)
def test_cutoff_keeps_more_than_the_shortlist_holds(operation) -> None:  # type: ignore[no-untyped-def]
    mixes = [(3, 1.0, 0.0), (0, 0.5, 0.0), (3, 0.5, 0.0), (8500, 1.0, 0.0), (8500, 0.99, 0.0)]
    scores_SV = torch.zeros(5, 9001, device=DEVICE)
    scores_SV[3:] = torch.arange(9001, device=DEVICE) * 1e-5
    counts = kept(operation, scores_SV, mixes).sum(-1)
    nucleus = int(warped(scores_SV[4], *mixes[4], nudge=0).sum())
    assert counts.tolist() == [9001, 9001, 9001, 8500, nucleus]
    assert SHORTLIST < nucleus < 8500


@pytest.mark.gpu
@pytest.mark.parametrize("operation", CUTOFFS)
def test_cutoff_is_minus_infinity_where_nothing_is_cut(operation) -> None:  # type: ignore[no-untyped-def]
    off = [(0, 1.0, 0.0), (300, 1.0, 0.0), (10**6, 1.0, 0.0)]
    assert torch.equal(
        operation(rand(3, 300), *parameters(off)), torch.full((3,), -INF, device=DEVICE)
    )
    # Nor does a row that is not read or has nothing to keep, such as padding, end up as NaN.
    unread_SV = torch.full((3, 300), float("nan"), device=DEVICE)
    assert torch.equal(
        operation(unread_SV, *parameters(off)), torch.full((3,), -INF, device=DEVICE)
    )
    empty_SV = torch.full((3, 300), -INF, device=DEVICE)
    actual_S = operation(empty_SV, *parameters([(5, 0.5, 0.5), (0, 0.5, 0.0), (5, 1.0, 0.0)]))
    assert torch.equal(actual_S, torch.full((3,), -INF, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("operation", CUTOFFS)
def test_cutoff_of_a_row_with_a_nan_is_nan(operation) -> None:  # type: ignore[no-untyped-def]
    """As scores are compared with it, no token is kept."""
    mixes = [(5, 1.0, 0.0), (0, 0.5, 0.0), (0, 1.0, 0.5), (5, 0.5, 0.5)]
    scores_SV = rand(8, 5000)
    expected_S = operation(scores_SV, *parameters(2 * mixes))
    scores_SV[:4, 4321] = expected_S[:4] = float("nan")
    torch.testing.assert_close(
        operation(scores_SV, *parameters(2 * mixes)), expected_S, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.gpu
@pytest.mark.parametrize("operation", CUTOFFS)
def test_cutoff_is_that_of_the_row_alone(operation) -> None:  # type: ignore[no-untyped-def]
    """In any batch and with any strides."""
    mixes = MIXES[2::5]
    scores_SV = 3 * rand(len(mixes), 700)
    together_S = operation(scores_SV, *parameters(mixes))
    alone_S = torch.cat(
        [operation(scores_SV[i : i + 1], *parameters([mix])) for i, mix in enumerate(mixes)]
    )
    assert torch.equal(together_S, alone_S)
    padded_SV = torch.cat([scores_SV, scores_SV], -1)[:, :700]
    assert torch.equal(together_S, operation(padded_SV, *parameters(mixes)))
    assert torch.equal(together_S, operation(scores_SV.t().contiguous().t(), *parameters(mixes)))
    assert torch.equal(
        together_S, operation(scores_SV, *(strided(parameter) for parameter in parameters(mixes)))
    )


COUNTS = [-1, 0, 1, 5, 20, -1, 3]
# Triton's interpreter computes with numpy, which has no bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]


def expect_logprobs(
    logits_SV: Tensor, chosen: list[int], counts: list[int], most: int
) -> tuple[Tensor, Tensor]:
    """A row at a time, in float64; equal logits are put in order by a sort of pairs."""
    values_SC = torch.zeros(len(counts), most + 1, dtype=torch.float64)
    ids_SC = torch.zeros(len(counts), most + 1, dtype=torch.int64)
    for row, (logits_V, token, count) in enumerate(
        zip(logits_SV.double().cpu(), chosen, counts, strict=True)
    ):
        if count < 0:
            continue
        logprobs_V = torch.log_softmax(logits_V, -1)
        values_SC[row, 0] = logprobs_V[token]
        ids_SC[row, 0] = 1 + int((logits_V > logits_V[token]).sum())
        values_SC[row, 1 : count + 1] = logprobs_V.topk(count).values
        order = sorted((-logit, i) for i, logit in enumerate(logits_V.tolist()))
        ids_SC[row, 1 : count + 1] = torch.tensor([i for _, i in order[:count]], dtype=torch.int64)
    return values_SC.float().to(DEVICE), ids_SC.to(DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("vocabulary", "most"), [(300, 20), (5000, 5), *([(151936, 20)] if CUDA else [])]
)
@pytest.mark.parametrize("operation", LOGPROBS)
def test_top_logprobs(operation, vocabulary, most, ties, dtype) -> None:  # type: ignore[no-untyped-def]
    counts = [min(count, most) for count in COUNTS]
    logits_SV = (4 * rand(len(counts), vocabulary)).to(dtype)
    logits_SV = logits_SV.round() if ties else logits_SV
    chosen = [5, 0, vocabulary - 1, int(logits_SV[3].argmax()), 7, 7, int(logits_SV[6].argmin())]
    inputs = (torch.tensor(chosen, device=DEVICE), torch.tensor(counts, device=DEVICE), most)
    expected = expect_logprobs(logits_SV, chosen, counts, most)
    rows_apart = torch.cat([logits_SV, torch.full_like(logits_SV, float("nan"))], -1)[
        :, :vocabulary
    ]
    for logits in (logits_SV, rows_apart, logits_SV.t().contiguous().t()):
        values_SC, ids_SC = operation(logits, *inputs)
        torch.testing.assert_close(values_SC, expected[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(ids_SC, expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("operation", LOGPROBS)
def test_top_logprobs_of_banned_tokens_and_unread_rows(operation) -> None:  # type: ignore[no-untyped-def]
    logits_SV = torch.full((3, 300), float("nan"), device=DEVICE)
    logits_SV[1] = -INF
    logits_SV[1, 10], logits_SV[1, 20] = 1.0, 2.0
    chosen_S = torch.tensor(
        [10**9, 10, -1], device=DEVICE
    )  # the ids of rows that ask for nothing mean nothing
    values_SC, ids_SC = operation(logits_SV, chosen_S, torch.tensor([-1, 5, -1], device=DEVICE), 5)
    two = torch.tensor([2.0, 1.0], device=DEVICE).log_softmax(-1).tolist()
    torch.testing.assert_close(values_SC[1].tolist(), [two[1], *two, -INF, -INF, -INF])
    assert ids_SC[1].tolist() == [2, 20, 10, 0, 1, 2]
    assert not values_SC[::2].any()
    assert not ids_SC[::2].any()


@pytest.mark.gpu
@pytest.mark.parametrize("operation", LOGPROBS)
def test_top_logprobs_of_a_row_with_a_nan_are_nan(operation) -> None:  # type: ignore[no-untyped-def]
    logits_SV = rand(2, 300)
    logits_SV[1, 7] = float("nan")
    chosen_S, count_S = torch.tensor([3, 3], device=DEVICE), torch.tensor([2, 2], device=DEVICE)
    values_SC, ids_SC = operation(logits_SV, chosen_S, count_S, 2)
    assert values_SC.isnan().tolist() == [[False] * 3, [True] * 3]
    assert 0 <= int(ids_SC.min()) <= int(ids_SC.max()) <= 300


def test_references_by_blocks_of_rows_are_those_of_all_rows() -> None:
    logits_SV, chosen_S = rand(40, 300), torch.arange(40, device=DEVICE)
    count_S = chosen_S % 7 - 1
    values_SC, ids_SC = top_logprobs_reference(logits_SV, chosen_S, count_S, 5)
    for row in range(40):
        part = slice(row, row + 1)
        alone = top_logprobs_reference(logits_SV[part], chosen_S[part], count_S[part], 5)
        assert torch.equal(alone[0], values_SC[part])
        assert torch.equal(alone[1], ids_SC[part])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("cut", "look", "backend"),
    [
        (sampling_cutoff, top_logprobs, "inductor"),
        (sampling_cutoff_reference, top_logprobs_reference, "aot_eager"),
    ],
    ids=["ops", "references"],
)
def test_compiled_is_eager(cut, look, backend) -> None:  # type: ignore[no-untyped-def]
    """The ops as opaque nodes, and the references traced; no arithmetic between them, which takes long to compile for a CPU."""

    def both(scores_SV, top_k_S, top_p_S, min_p_S, chosen_S, count_S):  # type: ignore[no-untyped-def]
        return cut(scores_SV, top_k_S, top_p_S, min_p_S), *look(scores_SV, chosen_S, count_S, 5)

    mixes = [(0, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.9, 0.0), (20, 0.9, 0.1), (0, 1.0, 0.1)]
    chosen_S, count_S = (
        torch.arange(5, device=DEVICE),
        torch.tensor([-1, 0, 1, 5, 2], device=DEVICE),
    )
    inputs = (2 * rand(5, 300), *parameters(mixes), chosen_S, count_S)
    compiled = torch.compile(both, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*inputs), both(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_kernels_in_a_captured_graph() -> None:
    """A replay answers for the parameters of the moment."""
    scores_SV = 3 * rand(4, 5000)
    chosen_S = torch.arange(4, device=DEVICE)
    now = (*parameters([(0, 1.0, 0.0)] * 4), torch.full((4,), -1, device=DEVICE))

    def both() -> tuple[Tensor, Tensor, Tensor]:
        return sampling_cutoff(scores_SV, *now[:3]), *top_logprobs(scores_SV, chosen_S, now[3], 5)

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both()
    for mixes, count in (
        ([(50, 0.9, 0.0)] * 4, 5),
        ([(0, 1.0, 0.1), (0, 0.5, 0.0), (1, 1.0, 0.0), (0, 1.0, 0.0)], 0),
    ):
        for tensor, new in zip(now, (*parameters(mixes), torch.full((4,), count)), strict=True):
            tensor.copy_(new)
        graph.replay()
        for actual, expected in zip(results, both(), strict=True):
            assert torch.equal(actual, expected)
