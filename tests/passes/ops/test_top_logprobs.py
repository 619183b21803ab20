"""Log-probabilities of chosen and most likely tokens: reference and kernel against float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from passes.ops.top_logprobs import top_logprobs, top_logprobs_kernel, top_logprobs_reference
from tests.conftest import DEVICE

CUDA = DEVICE.type == "cuda"
INF = float("inf")
Operation = Callable[..., tuple[Tensor, Tensor]]
IMPLEMENTATIONS = [top_logprobs_reference, top_logprobs_kernel]
COUNTS = [-1, 0, 1, 5, 20, -1, 3]
# Triton's interpreter computes with numpy, which has no bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def expected_logprobs(
    logits_SV: Tensor, chosen: list[int], counts: list[int], max_count: int
) -> tuple[Tensor, Tensor]:
    """Compute values in float64 a row at a time; sort pairs to order equal logits by id."""
    values_SC = torch.zeros(len(counts), max_count + 1, dtype=torch.float64)
    ids_SC = torch.zeros(len(counts), max_count + 1, dtype=torch.int64)
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
    ("vocab_size", "max_count"), [(300, 20), (5000, 5), *([(151936, 20)] if CUDA else [])]
)
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_values_and_ids(
    op: Operation, vocab_size: int, max_count: int, ties: bool, dtype: torch.dtype
) -> None:
    counts = [min(count, max_count) for count in COUNTS]
    logits_SV = (4 * rand(len(counts), vocab_size)).to(dtype)
    logits_SV = logits_SV.round() if ties else logits_SV
    chosen = [5, 0, vocab_size - 1, int(logits_SV[3].argmax()), 7, 7, int(logits_SV[6].argmin())]
    inputs = (torch.tensor(chosen, device=DEVICE), torch.tensor(counts, device=DEVICE), max_count)
    expected = expected_logprobs(logits_SV, chosen, counts, max_count)
    nan_SV = torch.full_like(logits_SV, float("nan"))
    rows_apart = torch.cat([logits_SV, nan_SV], -1)[:, :vocab_size]
    for logits in (logits_SV, rows_apart, logits_SV.t().contiguous().t()):
        values_SC, ids_SC = op(logits, *inputs)
        torch.testing.assert_close(values_SC, expected[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(ids_SC, expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_banned_tokens_and_unread_rows(op: Operation) -> None:
    logits_SV = torch.full((3, 300), float("nan"), device=DEVICE)
    logits_SV[1] = -INF
    logits_SV[1, 10], logits_SV[1, 20] = 1.0, 2.0
    # In rows whose count is -1, the chosen id may be invalid.
    chosen_S = torch.tensor([10**9, 10, -1], device=DEVICE)
    values_SC, ids_SC = op(logits_SV, chosen_S, torch.tensor([-1, 5, -1], device=DEVICE), 5)
    two = torch.tensor([2.0, 1.0], device=DEVICE).log_softmax(-1).tolist()
    torch.testing.assert_close(values_SC[1].tolist(), [two[1], *two, -INF, -INF, -INF])
    assert ids_SC[1].tolist() == [2, 20, 10, 0, 1, 2]
    assert not values_SC[::2].any()
    assert not ids_SC[::2].any()


@pytest.mark.gpu
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_nan_for_a_row_with_nan(op: Operation) -> None:
    logits_SV = rand(2, 300)
    logits_SV[1, 7] = float("nan")
    chosen_S, count_S = torch.tensor([3, 3], device=DEVICE), torch.tensor([2, 2], device=DEVICE)
    values_SC, ids_SC = op(logits_SV, chosen_S, count_S, 2)
    assert values_SC.isnan().tolist() == [[False] * 3, [True] * 3]
    assert 0 <= int(ids_SC.min()) <= int(ids_SC.max()) <= 300


def test_reference_does_not_depend_on_the_batch() -> None:
    """The reference processes several blocks of rows."""
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
    ("op", "backend"),
    [(top_logprobs, "inductor"), (top_logprobs_reference, "aot_eager")],
    ids=["op", "reference"],
)
def test_compiled_equals_eager(op: Operation, backend: str) -> None:
    """The op is an opaque node of the graph; the reference is traced."""
    chosen_S = torch.arange(5, device=DEVICE)
    count_S = torch.tensor([-1, 0, 1, 5, 2], device=DEVICE)
    inputs = (2 * rand(5, 300), chosen_S, count_S)
    compiled = torch.compile(lambda *args: op(*args, 5), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*inputs), op(*inputs, 5), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_captured_graph_reads_counts_at_replay() -> None:
    logits_SV = 3 * rand(4, 5000)
    chosen_S, count_S = torch.arange(4, device=DEVICE), torch.full((4,), -1, device=DEVICE)
    top_logprobs(logits_SV, chosen_S, count_S, 5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = top_logprobs(logits_SV, chosen_S, count_S, 5)
    for count in (5, 0):
        count_S.fill_(count)
        graph.replay()
        for result, expected in zip(
            actual, top_logprobs(logits_SV, chosen_S, count_S, 5), strict=True
        ):
            assert torch.equal(result, expected)
