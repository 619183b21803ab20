"""Which products become one: those whose weights together fill a storage."""

from collections.abc import Sequence

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from passes import PassContext
from passes.fx_utils import insert_call
from passes.merge_projections import MERGE_PROJECTIONS, PackedWeights

aten = torch.ops.aten
_SIZES = {"q": 8, "k": 4, "v": 4}


def _weights(storage: torch.Tensor, order: str) -> dict[str, torch.Tensor]:
    """Weights [N, 4] that lie one after another in a storage of rows."""
    begins = dict(
        zip(
            order,
            torch.tensor([0, *(_SIZES[name] for name in order)]).cumsum(0).tolist(),
            strict=False,
        )
    )
    return {name: storage[begins[name] : begins[name] + size] for name, size in _SIZES.items()}


def _products(weights: Sequence[torch.Tensor], x: torch.Tensor) -> GraphModule:
    """A graph of the products of x with each weight, whose inputs share storages as the weights do."""
    graph = Graph()
    with FakeTensorMode() as mode:
        tokens = graph.placeholder("x")
        tokens.meta["val"] = mode.from_tensor(x)
        nodes = [graph.placeholder(f"weight_{number}") for number in range(len(weights))]
        for node, weight in zip(nodes, weights, strict=True):
            node.meta["val"] = mode.from_tensor(weight)
        graph.output(
            [
                insert_call(
                    graph,
                    aten.mm.default,
                    tokens,
                    insert_call(graph, aten.permute.default, node, [1, 0]),
                )
                for node in nodes
            ]
        )
    return GraphModule({}, graph)


@pytest.mark.parametrize("order", ["qkv", "kqv", "vkq"])
@pytest.mark.parametrize("spare", [0, 1])
def test_products_read_their_own_rows(order: str, spare: int) -> None:
    weights = _weights(torch.randn(16 + spare, 4), order)
    x = torch.randn(3, 4)
    module = _products(list(weights.values()), x)
    expected = [x @ weight.T for weight in weights.values()]
    names = ((*order,),) if not spare else ()
    context = PassContext(num_tokens=3, facts=(PackedWeights(names),))
    matches = MERGE_PROJECTIONS.run(module.graph, context)
    assert matches == MERGE_PROJECTIONS.expected(context)
    module.recompile()
    assert len(module.graph.find_nodes(op="call_function", target=aten.mm.default)) == (
        3 if spare else 1
    )
    torch.testing.assert_close(module(x, *weights.values()), expected)


def test_weights_of_storages_of_their_own_stay_apart() -> None:
    module = _products([torch.randn(4, 4), torch.randn(4, 4)], torch.randn(3, 4))
    context = PassContext(num_tokens=3)
    assert MERGE_PROJECTIONS.run(module.graph, context) == []
