"""The linear kernel against its reference, and the pass against the graphs of real models."""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from compiled_llm import CompiledLLM
from passes import PassContext, fuse_skinny_linear
from passes.fx_utils import insert_call
from passes.ops import skinny_linear as op
from passes.ops.skinny_linear import (
    skinny_linear_cpu,
    skinny_linear_kernel,
    skinny_linear_reference,
)
from tests.conftest import DEVICE
from tests.helpers.tiny_models import Reference, greedy, prompt_of, small_config, tiny_model

aten = torch.ops.aten
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]


PLAIN, GATED, RESIDUAL = (False, False), (True, False), (False, True)
CASES = [
    (1, 96, 160),
    (1, 100, 72),
    (2, 100, 72),
    (3, 96, 160),
    (4, 40, 600),
    (16, 100, 72),
    (17, 96, 512),
    (32, 40, 600),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("gated", "residual"), [PLAIN, GATED, RESIDUAL])
@pytest.mark.parametrize(("num_tokens", "num_out", "num_in"), CASES)
def test_kernel_is_the_reference(num_tokens, num_out, num_in, gated, residual, norm, dtype) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    x = torch.randn(num_tokens, 2 * num_in, device=DEVICE, dtype=dtype)[
        :, :num_in
    ]  # rows apart, as slices of a product are
    weight = torch.randn(num_out * (1 + gated), num_in, device=DEVICE, dtype=dtype) / num_in**0.5
    scale = torch.rand(num_in, device=DEVICE, dtype=dtype) + 0.5 if norm else None
    kept = torch.randn(num_tokens, num_out, device=DEVICE, dtype=dtype) if residual else None
    arguments = (x, weight, scale, 1e-6, kept, gated)
    wide = [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    ]
    expected = (
        skinny_linear_reference(*wide) if not norm else skinny_linear_reference(*arguments).double()
    )
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(
        skinny_linear_kernel(*arguments).double(), expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.usefixtures("vector_isa")
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("gated", "residual"), [PLAIN, GATED, RESIDUAL])
@pytest.mark.parametrize(
    ("num_tokens", "size"),
    [(1, (5, 20)), (3, (7, 33)), (7, (6, 50)), (8, (64, 100)), (9, (65, 64)), (32, (40, 64))],
)
def test_cpp_is_the_reference(num_tokens, size, gated, residual, norm) -> None:  # type: ignore[no-untyped-def]
    """Sizes that leave tiles of features, of tokens and of sums unfinished."""
    torch.manual_seed(0)
    num_out, num_in = size
    x, weight = (
        torch.randn(num_tokens, 2 * num_in)[:, :num_in],
        torch.randn(num_out * (1 + gated), num_in) / num_in**0.5,
    )
    scale = torch.rand(num_in) + 0.5 if norm else None
    kept = torch.randn(num_tokens, num_out) if residual else None
    together = skinny_linear_cpu(x, weight, scale, 1e-6, kept, gated)
    torch.testing.assert_close(
        together, skinny_linear_reference(x, weight, scale, 1e-6, kept, gated)
    )
    alone = [
        skinny_linear_cpu(
            x[t : t + 1], weight, scale, 1e-6, None if kept is None else kept[t : t + 1], gated
        )
        for t in range(num_tokens)
    ]
    if gated:  # the exponential is computed for several tokens at once
        torch.testing.assert_close(torch.cat(alone), together, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(torch.cat(alone), together), "a token's sums do not depend on the others"


def _found(llm: CompiledLLM) -> dict[str, int]:
    return {
        bucket.bucket: graph_pass.matches
        for bucket in llm.report().buckets
        for graph_pass in bucket.passes
        if graph_pass.name == "fuse_skinny_linear"
    }


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "olmo2"])
def test_the_pass_changes_no_token(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the reference stands for the kernel."""
    labels: dict[int, list[str]] = {}
    rewrite = fuse_skinny_linear._fuse

    def noting(graph, product):  # type: ignore[no-untyped-def]
        num_tokens = product.meta["val"].shape[0]
        labels.setdefault(num_tokens, []).append(rewrite(graph, product))
        return labels[num_tokens][-1]

    monkeypatch.setattr(fuse_skinny_linear, "_is_supported", lambda product: True)
    monkeypatch.setattr(fuse_skinny_linear, "_fuse", noting)
    model = tiny_model(family)
    reference = Reference(model)
    config = small_config(
        buckets={"decode": [1, 4], "prefill": [80]},
        limits={"max_num_seqs": 4, "max_num_batched_tokens": 80, "max_model_len": 128},
        compile={"options": {"fx_graph_cache": False}},
    )
    prompts = [prompt_of(length) for length in (5, 30, 40)]
    with CompiledLLM(model, None, config, progress=False) as llm:
        assert greedy(llm, prompts, 12) == [reference(prompt, 12) for prompt in prompts]
        assert greedy(llm, prompts[:1], 12) == [reference(prompts[0], 12)]
        assert not llm.report().fallbacks
        assert _found(llm)["prefill-80-greedy"] == 0
    if family in ("llama", "qwen3"):
        layer = ["linear+norm", "linear+residual", "linear+norm+gate", "linear+residual"]
        assert labels[1] == labels[4] == [*layer, *layer, "linear+norm"]


def _scaled(graph: torch.fx.Graph, weight: torch.fx.Node) -> torch.fx.Node:
    return insert_call(graph, aten.mul.Tensor, weight, 2.0)


def _normalised(graph: torch.fx.Graph, weight: torch.fx.Node) -> torch.fx.Node:
    return insert_call(
        graph,
        aten.div.Tensor,
        weight,
        insert_call(graph, aten.linalg_vector_norm.default, weight, 2, [1], True),
    )


def _copied_by_a_reshape(graph: torch.fx.Graph, weight: torch.fx.Node) -> torch.fx.Node:
    flat = insert_call(
        graph,
        aten.reshape.default,
        insert_call(graph, aten.permute.default, weight, [1, 0]),
        [64 * 64],
    )
    return insert_call(graph, aten.view.default, flat, [64, 64])


def _written_before(graph: torch.fx.Graph, weight: torch.fx.Node) -> torch.fx.Node:
    insert_call(
        graph, aten.mul_.Tensor, insert_call(graph, aten.view.default, weight, [64, 64]), 2.0
    )
    return weight


def _itself(graph: torch.fx.Graph, weight: torch.fx.Node) -> torch.fx.Node:
    return weight


def _read_as_one(graph: torch.fx.Graph, weight: torch.fx.Node) -> torch.fx.Node:
    """As `merge_projections` has it."""
    return insert_call(graph, aten.as_strided.default, weight, [128, 64], [64, 1], 0)


def _half(graph: torch.fx.Graph, weight: torch.fx.Node) -> torch.fx.Node:
    return insert_call(graph, aten.slice.Tensor, weight, 0, 0, 32)


@pytest.mark.parametrize(
    "prepare",
    [_scaled, _normalised, _copied_by_a_reshape, _written_before, _itself, _read_as_one, _half],
)
def test_only_weights_that_nothing_computes_are_taken(
    prepare: Callable[[torch.fx.Graph, torch.fx.Node], torch.fx.Node],
) -> None:
    """Launched early, the kernel reads its weight while kernels ahead of it still write what they compute."""
    graph = torch.fx.Graph()
    with FakeTensorMode():
        x, weight = graph.placeholder("x"), graph.placeholder("weight")
        x.meta["val"], weight.meta["val"] = torch.empty(2, 64), torch.empty(128, 64)[:64]
        product = insert_call(
            graph,
            aten.mm.default,
            x,
            insert_call(graph, aten.permute.default, prepare(graph, weight), [1, 0]),
        )
        graph.output(product)
    context = PassContext(num_tokens=2)
    labels = fuse_skinny_linear.FUSE_SKINNY_LINEAR.run(graph, context)
    assert labels == (["linear"] if prepare in (_itself, _read_as_one, _half) else [])
    assert len(graph.find_nodes(op="call_function", target=op.skinny_linear)) == len(labels)


def test_several_tokens_in_float16_are_normed_before() -> None:
    """Times the norm's weight, before they are normed, they could be too large."""
    graph = torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    product = graph.call_function(torch.ops.aten.mm.default, (x, weight))
    taken = {}
    with FakeTensorMode():
        for dtype in (torch.float16, torch.bfloat16):
            for num_tokens in (1, 8):
                x.meta["val"] = product.meta["val"] = torch.empty(
                    num_tokens, 64, dtype=dtype, device="cuda"
                )
                weight.meta["val"] = torch.empty(64, 64, dtype=dtype, device="cuda")
                taken[dtype, num_tokens] = fuse_skinny_linear._can_fuse_norm(product)
    assert [key for key, value in taken.items() if not value] == [(torch.float16, 8)]


@pytest.mark.parametrize("num_groups", [1, 2])
def test_a_norm_of_groups_of_features_stays(num_groups: int) -> None:
    """As mamba2 has it: the mean is over each group."""
    graph, aten = torch.fx.Graph(), torch.ops.aten
    with FakeTensorMode():
        tokens, weight = graph.placeholder("tokens"), graph.placeholder("weight")
        tokens.meta["val"], weight.meta["val"] = torch.empty(3, 64), torch.empty(64)
        groups = insert_call(graph, aten.reshape.default, tokens, [3, num_groups, 64 // num_groups])
        mean = insert_call(
            graph, aten.mean.dim, insert_call(graph, aten.pow.Tensor_Scalar, groups, 2), [-1], True
        )
        factor = insert_call(
            graph, aten.rsqrt.default, insert_call(graph, aten.add.Tensor, mean, 1e-6)
        )
        normed = insert_call(
            graph,
            aten.reshape.default,
            insert_call(graph, aten.mul.Tensor, groups, factor),
            [3, 64],
        )
        x = insert_call(graph, aten.mul.Tensor, weight, normed)
    found = fuse_skinny_linear._match_norm(x)
    assert (found is not None) == (num_groups == 1)


def test_several_tokens_are_served_where_that_pays() -> None:
    """Of an 8B and a 0.6B model: q, k and v; o; gate and up; down; lm_head."""
    large = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256)]
    small = [(1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024), (1024, 151936)]
    assert [fuse_skinny_linear._is_faster_than_cublas(8, *shape) for shape in large] == [
        False,
        True,
        False,
        True,
        False,
    ]
    assert [fuse_skinny_linear._is_faster_than_cublas(8, *shape) for shape in small] == [
        True,
        True,
        True,
        True,
        False,
    ]
    assert all(
        fuse_skinny_linear._is_faster_than_cublas(1, *shape)
        and not fuse_skinny_linear._is_faster_than_cublas(17, *shape)
        for shape in large + small
    )


def test_tiles_suit_matrix_instructions() -> None:
    for num_rows, num_in in (
        (64, 4096),
        (4096, 4096),
        (96, 20),
        (1024, 3072),
        (6144, 1024),
        (960, 576),
    ):
        for num_tokens in (3, 8, 16, 32):
            tiles = op._matrix_tiles(num_tokens, num_rows, num_in)
            assert tiles["FIRST_K"] % tiles["TILE_K"] == 0
            assert tiles["TILE_K"] >= 16 * tiles["WARPS"]
            assert tiles["TILE_T"] >= num_tokens


@pytest.mark.gpu
def test_inputs_in_columns_are_as_good_as_in_rows() -> None:
    """The compiler lays a tensor out as it likes: behind a convolution, say, features come apart."""
    torch.manual_seed(0)
    x, kept = torch.randn(100, 3, device=DEVICE).t(), torch.randn(72, 3, device=DEVICE).t()
    weight = torch.randn(72, 100, device=DEVICE) / 10
    operation = skinny_linear_cpu if DEVICE.type == "cpu" else skinny_linear_kernel
    actual = operation(x, weight, None, 0.0, kept, False)
    torch.testing.assert_close(actual, skinny_linear_reference(x, weight, None, 0.0, kept, False))
