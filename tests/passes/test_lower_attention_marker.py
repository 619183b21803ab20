"""The lowering of attention markers: the graph before and after, and what it computes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from passes import AttentionLayers, PassContext, PassError, Pipeline
from passes.fx_utils import insert_call
from passes.lower_attention_marker import LOWER_ATTENTION_MARKER
from passes.ops.attention_marker import attention_marker, attention_marker_reference
from passes.ops.library import use_references
from passes.ops.paged_attention import paged_attention

aten = torch.ops.aten
NAMES = ("layers.0.attention", "layers.1.attention")
CONTEXT = PassContext(num_tokens=5, facts=(AttentionLayers(NAMES),))
# Two sequences of 7 and 20 tokens, of which the last 2 and 3 are queries; pages of 16 tokens.
QUERIES = [(0, 5), (0, 6), (1, 17), (1, 18), (1, 19)]
TABLE = torch.tensor([[3, 0], [1, 4]], dtype=torch.int32)


def make_inputs() -> dict[str, Tensor]:
    """Return the inputs of a step of two layers: 4 query heads, 2 key/value heads."""
    torch.manual_seed(0)
    slots = [int(TABLE[s, token // 16]) * 16 + token % 16 for s, token in QUERIES]
    inputs = {
        "slots": torch.tensor([slots]),
        "block_table": TABLE,
        "query_start": torch.tensor([0, 2, 5], dtype=torch.int32),
        "seq_lens": torch.tensor([7, 20], dtype=torch.int32),
        "split_counters": torch.zeros(4, dtype=torch.int32),
    }
    for layer in range(2):
        inputs[f"q_{layer}"] = torch.randn(1, 4, 5, 32)
        inputs[f"k_{layer}"] = torch.randn(1, 2, 5, 32)
        inputs[f"v_{layer}"] = torch.randn(1, 2, 5, 24)
        inputs[f"k_cache_{layer}"] = torch.randn(6, 16, 2, 32)
        inputs[f"v_cache_{layer}"] = torch.randn(6, 16, 2, 24)
    return inputs


def options(layer: int) -> tuple[Any, ...]:
    """Return sinks, slopes, layer, scale, window, softcap and max_query_len of a marker."""
    return None, None, layer, 0.2, 0 if layer == 0 else 4, 0.0, 3


def make_module(inputs: dict[str, Tensor]) -> GraphModule:
    """Return a graph of two markers, each of which selects the slots by a node of its own."""
    graph = Graph()
    with FakeTensorMode() as mode:
        nodes: dict[str, Node] = {}
        for name, value in inputs.items():
            nodes[name] = graph.placeholder(name)
            nodes[name].meta["val"] = mode.from_tensor(value)
        results = []
        metadata = [nodes[name] for name in [*inputs][1:5]]
        for layer in range(2):
            tensors = [nodes[f"{name}_{layer}"] for name in ("q", "k", "v", "k_cache", "v_cache")]
            slots = insert_call(graph, aten.select.int, nodes["slots"], 0, 0)
            arguments = (*tensors, slots, *metadata, *options(layer))
            results.append(insert_call(graph, attention_marker, *arguments))
        graph.output(results)
    return GraphModule({}, graph)


def test_markers_become_cache_writes_and_paged_attention() -> None:
    module = make_module(make_inputs())
    assert LOWER_ATTENTION_MARKER.run(module.graph, CONTEXT) == list(NAMES)
    module.graph.lint()

    def count(target: OpOverload) -> int:
        return len(module.graph.find_nodes(op="call_function", target=target))

    assert count(attention_marker) == 0
    assert count(paged_attention) == 2
    assert count(aten.index_put_.default) == 4
    # Pages and offsets are computed once for layers with equal slots.
    assert count(aten.bitwise_right_shift.Tensor_Scalar) == 1
    assert count(aten.bitwise_and.Scalar) == 1
    for node in module.graph.find_nodes(op="call_function", target=aten.unsqueeze.default):
        assert node.meta["val"].shape == (1, 5, 4, 24)


def test_results_and_caches_equal_those_of_the_marker() -> None:
    inputs, expected_inputs = make_inputs(), make_inputs()
    module = make_module(inputs)
    LOWER_ATTENTION_MARKER.run(module.graph, CONTEXT)
    module.recompile()
    with use_references(), torch.no_grad():
        results = module(**inputs)
        for layer in range(2):
            names = ("q", "k", "v", "k_cache", "v_cache")
            tensors = [expected_inputs[f"{name}_{layer}"] for name in names]
            metadata = [expected_inputs[name] for name in [*inputs][1:5]]
            slots = expected_inputs["slots"][0]
            arguments = (*tensors, slots, *metadata, *options(layer))
            expected = attention_marker_reference(*arguments)
            torch.testing.assert_close(results[layer], expected)
    for name, value in inputs.items():
        assert torch.equal(value, expected_inputs[name]), name


def test_an_attention_call_without_a_marker_is_an_error() -> None:
    context = PassContext(num_tokens=5, facts=(AttentionLayers((*NAMES, "layers.2.attention")),))
    with pytest.raises(PassError, match=r"it missed layers\.2\.attention"):
        Pipeline([LOWER_ATTENTION_MARKER], context)(make_module(make_inputs()).graph)
