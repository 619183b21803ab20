"""The fusion of linear layers over few tokens: on models, and on graphs that must stay."""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from compiled_llm import CompiledLLM
from passes import PassContext, fuse_skinny_linear
from passes.fuse_skinny_linear import FUSE_SKINNY_LINEAR
from passes.fx_utils import insert_call
from passes.ops.skinny_linear import MAX_TOKENS, skinny_linear
from tests.helpers.tiny_models import Reference, greedy, prompt_of, small_config, tiny_model

aten = torch.ops.aten


def _matches(llm: CompiledLLM) -> dict[str, int]:
    return {
        bucket.bucket: graph_pass.matches
        for bucket in llm.report().buckets
        for graph_pass in bucket.passes
        if graph_pass.name == "fuse_skinny_linear"
    }


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "olmo2"])
def test_no_token_changes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    labels: dict[int, list[str]] = {}
    fuse = fuse_skinny_linear._fuse

    def recording_fuse(graph: Graph, product: Node) -> str:
        num_tokens = product.meta["val"].shape[0]
        label = fuse(graph, product)
        labels.setdefault(num_tokens, []).append(label)
        return label

    monkeypatch.setattr(fuse_skinny_linear, "_is_supported", lambda product: True)
    monkeypatch.setattr(fuse_skinny_linear, "_fuse", recording_fuse)
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
        assert _matches(llm)["prefill-80-greedy"] == 0
    if family in ("llama", "qwen3"):
        layer = ["linear+norm", "linear+residual", "linear+norm+gate", "linear+residual"]
        assert labels[1] == labels[4] == [*layer, *layer, "linear+norm"]


def _scaled(graph: Graph, weight: Node) -> Node:
    return insert_call(graph, aten.mul.Tensor, weight, 2.0)


def _normalized(graph: Graph, weight: Node) -> Node:
    length = insert_call(graph, aten.linalg_vector_norm.default, weight, 2, [1], True)
    return insert_call(graph, aten.div.Tensor, weight, length)


def _copied_by_reshape(graph: Graph, weight: Node) -> Node:
    transpose = insert_call(graph, aten.permute.default, weight, [1, 0])
    flat = insert_call(graph, aten.reshape.default, transpose, [64 * 64])
    return insert_call(graph, aten.view.default, flat, [64, 64])


def _mutated(graph: Graph, weight: Node) -> Node:
    view = insert_call(graph, aten.view.default, weight, [64, 64])
    insert_call(graph, aten.mul_.Tensor, view, 2.0)
    return weight


def _unchanged(graph: Graph, weight: Node) -> Node:
    return weight


def _merged(graph: Graph, weight: Node) -> Node:
    """As `merge_projections` reads several weights."""
    return insert_call(graph, aten.as_strided.default, weight, [128, 64], [64, 1], 0)


def _half(graph: Graph, weight: Node) -> Node:
    return insert_call(graph, aten.slice.Tensor, weight, 0, 0, 32)


@pytest.mark.parametrize(
    ("prepare", "is_fused"),
    [
        (_scaled, False),
        (_normalized, False),
        (_copied_by_reshape, False),
        (_mutated, False),
        (_unchanged, True),
        (_merged, True),
        (_half, True),
    ],
)
def test_weights_that_the_graph_computes_are_not_fused(
    prepare: Callable[[Graph, Node], Node], is_fused: bool
) -> None:
    """With PDL, the kernel reads its weight while preceding kernels may still write theirs."""
    graph = Graph()
    with FakeTensorMode():
        x, weight = graph.placeholder("x"), graph.placeholder("weight")
        x.meta["val"], weight.meta["val"] = torch.empty(2, 64), torch.empty(128, 64)[:64]
        transpose = insert_call(graph, aten.permute.default, prepare(graph, weight), [1, 0])
        graph.output(insert_call(graph, aten.mm.default, x, transpose))
    labels = FUSE_SKINNY_LINEAR.run(graph, PassContext(num_tokens=2))
    assert labels == (["linear"] if is_fused else [])
    assert len(graph.find_nodes(op="call_function", target=skinny_linear)) == len(labels)


def test_no_match_in_large_steps() -> None:
    graph = Graph()
    num_tokens = MAX_TOKENS + 1
    with FakeTensorMode():
        x, weight = graph.placeholder("x"), graph.placeholder("weight")
        x.meta["val"], weight.meta["val"] = torch.empty(num_tokens, 64), torch.empty(64, 64)
        transpose = insert_call(graph, aten.permute.default, weight, [1, 0])
        graph.output(insert_call(graph, aten.mm.default, x, transpose))
    assert FUSE_SKINNY_LINEAR.run(graph, PassContext(num_tokens=num_tokens)) == []


def test_norm_of_several_float16_tokens_is_not_fused() -> None:
    """Multiplied by the norm's weight before they are normalized, they may overflow."""
    graph = Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    product = graph.call_function(aten.mm.default, (x, weight))
    fused = {}
    with FakeTensorMode():
        for dtype in (torch.float16, torch.bfloat16):
            for num_tokens in (1, 8):
                value = torch.empty(num_tokens, 64, dtype=dtype, device="cuda")
                x.meta["val"] = product.meta["val"] = value
                weight.meta["val"] = torch.empty(64, 64, dtype=dtype, device="cuda")
                fused[dtype, num_tokens] = fuse_skinny_linear._can_fuse_norm(product)
    assert [key for key, value in fused.items() if not value] == [(torch.float16, 8)]


@pytest.mark.parametrize("num_groups", [1, 2])
def test_group_norm_does_not_match(num_groups: int) -> None:
    """Mamba2 normalizes groups of features."""
    graph = Graph()
    with FakeTensorMode():
        tokens, weight = graph.placeholder("tokens"), graph.placeholder("weight")
        tokens.meta["val"], weight.meta["val"] = torch.empty(3, 64), torch.empty(64)
        shape = [3, num_groups, 64 // num_groups]
        groups = insert_call(graph, aten.reshape.default, tokens, shape)
        square = insert_call(graph, aten.pow.Tensor_Scalar, groups, 2)
        mean = insert_call(graph, aten.mean.dim, square, [-1], True)
        shifted = insert_call(graph, aten.add.Tensor, mean, 1e-6)
        factor = insert_call(graph, aten.rsqrt.default, shifted)
        scaled = insert_call(graph, aten.mul.Tensor, groups, factor)
        normalized = insert_call(graph, aten.reshape.default, scaled, [3, 64])
        x = insert_call(graph, aten.mul.Tensor, weight, normalized)
    found = fuse_skinny_linear._match_norm(x)
    assert (found is not None) == (num_groups == 1)


# Input and output features: qkv, o, gate and up, down, and lm_head.
LAYERS_8B = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256)]
LAYERS_0_6B = [(1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024), (1024, 151936)]


def test_layers_that_are_faster_than_cublas() -> None:
    is_faster = fuse_skinny_linear._is_faster_than_cublas
    assert [is_faster(8, *layer) for layer in LAYERS_8B] == [False, True, False, True, False]
    assert [is_faster(8, *layer) for layer in LAYERS_0_6B] == [True, True, True, True, False]
    for layer in LAYERS_8B + LAYERS_0_6B:
        assert is_faster(1, *layer)
        assert not is_faster(17, *layer)
