"""The sampling cutoff: reference and kernel against transformers' warpers and each other."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from passes.ops.sampling_cutoff import (
    SHORTLIST,
    sampling_cutoff,
    sampling_cutoff_kernel,
    sampling_cutoff_reference,
)
from tests.conftest import DEVICE

CUDA = DEVICE.type == "cuda"
INF = float("inf")
IMPLEMENTATIONS = [sampling_cutoff_reference, sampling_cutoff_kernel]
Operation = Callable[..., Tensor]
# top-k, top-p and min-p of a row.
Mix = tuple[int, float, float]
# Combinations of top-k (off, few, more than a block's lanes, more than V), top-p and min-p. The
# interpreter is slow, so it runs a part of them, in which each setting occurs with most others.
MIXES = list(
    itertools.product([0, 1, 40, 4500, 10**6], [1.0, 1e-6, 0.5, 0.95, 0.999], [0.0, 0.05, 1.0])
)[:: 1 if CUDA else 4]


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def parameters(mixes: list[Mix]) -> tuple[Tensor, Tensor, Tensor]:
    top_k, top_p, min_p = (
        torch.tensor(column, device=DEVICE) for column in zip(*mixes, strict=True)
    )
    return top_k, top_p, min_p


def strided(x: Tensor) -> Tensor:
    """Return a tensor of the same values with other values between them in memory."""
    return torch.stack([x, x.roll(1), x.roll(2)], 1)[:, 0]


def warped(scores_V: Tensor, top_k: int, top_p: float, min_p: float, nudge: float) -> Tensor:
    """Return which tokens transformers keeps.

    A nudge of 1 lowers its thresholds by about the error of float32, one of -1 raises them.
    """
    top_p = min(max(top_p + nudge * 2e-6, 0.0), 1.0) if top_p < 1 else 1.0
    min_p = min(min_p * (1 - nudge * 1e-5), 1.0)
    warpers: list[LogitsProcessor] = [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    scores_1V = scores_V[None]
    for warper in warpers:
        scores_1V = warper(None, scores_1V)
    return scores_1V[0] > -INF


def kept_tokens(op: Operation, scores_SV: Tensor, mixes: list[Mix]) -> Tensor:
    cutoff_S = op(scores_SV, *parameters(mixes))
    assert cutoff_S.dtype == torch.float32
    return (scores_SV >= cutoff_S[:, None]) & (scores_SV > -INF)


# With a spread of 0.5 no lane stands out, and a vocabulary larger than the shortlist must be
# searched as a whole.
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("vocab_size", "spread"),
    [
        (300, 3.0),
        (5000, 3.0),
        (9001, 0.5),
        *([(50257, 2.0), (151936, 0.5), (262144, 3.0)] if CUDA else []),
    ],
)
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_keeps_the_tokens_that_warpers_keep(op: Operation, vocab_size: int, spread: float) -> None:
    scores_SV = spread * rand(len(MIXES), vocab_size)
    scores_SV[::2, :250] = -INF
    actual_SV = kept_tokens(op, scores_SV, MIXES)
    for scores_V, actual_V, mix in zip(scores_SV, actual_SV, MIXES, strict=True):
        least_V, most_V = warped(scores_V, *mix, nudge=-1), warped(scores_V, *mix, nudge=1)
        assert not (least_V & ~actual_V).any(), mix
        assert not (actual_V & ~most_V).any(), mix
        assert actual_V.any(), mix


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [300, 5000, *([151936] if CUDA else [])])
def test_kernel_equals_reference(vocab_size: int) -> None:
    """Cutoffs of top-k and top-p are scores, so they are equal bit by bit, also with many ties."""
    mixes = list(itertools.product([0, 1, 40, 4500], [1.0, 0.5, 0.95], [0.0])) * 2
    scores_SV = 4 * rand(len(mixes), vocab_size)
    scores_SV[len(mixes) // 2 :] = scores_SV[len(mixes) // 2 :].round()
    expected_S, actual_S = (op(scores_SV, *parameters(mixes)) for op in IMPLEMENTATIONS)
    assert torch.equal(actual_S, expected_S)


@pytest.mark.gpu
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_ties_are_kept_together(op: Operation) -> None:
    scores_V = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0, -0.0, -1.0, -INF], device=DEVICE)
    counts = {
        (2, 1.0, 0.0): 4,
        (0, 0.5, 0.0): 4,
        (5, 1.0, 0.0): 6,
        (7, 1.0, 0.0): 7,
        (3, 0.9, 0.0): 4,
        (0, 1.0, 1.0): 1,
    }
    actual = kept_tokens(op, scores_V.expand(len(counts), -1), [*counts]).sum(-1)
    assert actual.tolist() == [*counts.values()]


@pytest.mark.gpu
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_more_tokens_are_kept_than_the_shortlist_holds(op: Operation) -> None:
    mixes = [(3, 1.0, 0.0), (0, 0.5, 0.0), (3, 0.5, 0.0), (8500, 1.0, 0.0), (8500, 0.99, 0.0)]
    scores_SV = torch.zeros(5, 9001, device=DEVICE)
    scores_SV[3:] = torch.arange(9001, device=DEVICE) * 1e-5
    counts = kept_tokens(op, scores_SV, mixes).sum(-1)
    nucleus = int(warped(scores_SV[4], *mixes[4], nudge=0).sum())
    assert counts.tolist() == [9001, 9001, 9001, 8500, nucleus]
    assert SHORTLIST < nucleus < 8500


@pytest.mark.gpu
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_minus_infinity_if_nothing_is_cut(op: Operation) -> None:
    expected_S = torch.full((3,), -INF, device=DEVICE)
    disabled = parameters([(0, 1.0, 0.0), (300, 1.0, 0.0), (10**6, 1.0, 0.0)])
    assert torch.equal(op(rand(3, 300), *disabled), expected_S)
    # Rows that are not read, and rows of -inf, such as padding, do not give NaN.
    unread_SV = torch.full((3, 300), float("nan"), device=DEVICE)
    assert torch.equal(op(unread_SV, *disabled), expected_S)
    empty_SV = torch.full((3, 300), -INF, device=DEVICE)
    enabled = parameters([(5, 0.5, 0.5), (0, 0.5, 0.0), (5, 1.0, 0.0)])
    assert torch.equal(op(empty_SV, *enabled), expected_S)


@pytest.mark.gpu
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_nan_for_a_row_with_nan(op: Operation) -> None:
    """No score compares as at least NaN, so no token is kept."""
    inputs = parameters(2 * [(5, 1.0, 0.0), (0, 0.5, 0.0), (0, 1.0, 0.5), (5, 0.5, 0.5)])
    scores_SV = rand(8, 5000)
    expected_S = op(scores_SV, *inputs)
    scores_SV[:4, 4321] = expected_S[:4] = float("nan")
    actual_S = op(scores_SV, *inputs)
    torch.testing.assert_close(actual_S, expected_S, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_rows_do_not_depend_on_batch_and_strides(op: Operation) -> None:
    mixes = MIXES[2::5]
    inputs = parameters(mixes)
    scores_SV = 3 * rand(len(mixes), 700)
    expected_S = op(scores_SV, *inputs)
    alone = [op(scores_SV[i : i + 1], *parameters([mix])) for i, mix in enumerate(mixes)]
    assert torch.equal(torch.cat(alone), expected_S)
    padded_SV = torch.cat([scores_SV, scores_SV], -1)[:, :700]
    assert torch.equal(op(padded_SV, *inputs), expected_S)
    assert torch.equal(op(scores_SV.t().contiguous().t(), *inputs), expected_S)
    assert torch.equal(op(scores_SV, *map(strided, inputs)), expected_S)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "backend"),
    [(sampling_cutoff, "inductor"), (sampling_cutoff_reference, "aot_eager")],
    ids=["op", "reference"],
)
def test_compiled_equals_eager(op: Operation, backend: str) -> None:
    """The op is an opaque node of the graph; the reference is traced."""
    mixes = [(0, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.9, 0.0), (20, 0.9, 0.1), (0, 1.0, 0.1)]
    inputs = (2 * rand(5, 300), *parameters(mixes))
    compiled = torch.compile(lambda *args: op(*args), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*inputs), op(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_captured_graph_reads_parameters_at_replay() -> None:
    scores_SV = 3 * rand(4, 5000)
    inputs = parameters([(0, 1.0, 0.0)] * 4)
    sampling_cutoff(scores_SV, *inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual_S = sampling_cutoff(scores_SV, *inputs)
    for mixes in (
        [(50, 0.9, 0.0)] * 4,
        [(0, 1.0, 0.1), (0, 0.5, 0.0), (1, 1.0, 0.0), (0, 1.0, 0.0)],
    ):
        for tensor, new in zip(inputs, parameters(mixes), strict=True):
            tensor.copy_(new)
        graph.replay()
        assert torch.equal(actual_S, sampling_cutoff(scores_SV, *inputs))
