"""The merge of products whose weights fill one storage, and products that must stay."""

from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from passes import PassContext
from passes.fx_utils import insert_call
from passes.merge_projections import MERGE_PROJECTIONS, PackedWeights, are_packed

aten = torch.ops.aten
SIZES = {"q": 8, "k": 4, "v": 4}


def make_weights(storage: Tensor, order: str) -> dict[str, Tensor]:
    """Return weights [N, 4] that follow each other in the rows of a storage in the given order."""
    begins = dict(zip(order, accumulate((SIZES[name] for name in order), initial=0), strict=False))
    return {name: storage[begins[name] : begins[name] + size] for name, size in SIZES.items()}


def make_products(weights: Sequence[Tensor], x: Tensor) -> GraphModule:
    """Return a graph of the products of x with each weight.

    Its fake inputs share storages as the weights do.
    """
    graph = Graph()
    with FakeTensorMode() as mode:
        tokens = graph.placeholder("x")
        tokens.meta["val"] = mode.from_tensor(x)
        nodes = [graph.placeholder(f"weight_{number}") for number in range(len(weights))]
        products = []
        for node, weight in zip(nodes, weights, strict=True):
            node.meta["val"] = mode.from_tensor(weight)
        for node in nodes:
            transpose = insert_call(graph, aten.permute.default, node, [1, 0])
            products.append(insert_call(graph, aten.mm.default, tokens, transpose))
        graph.output(products)
    return GraphModule({}, graph)


@pytest.mark.parametrize("order", ["qkv", "kqv", "vkq"])
@pytest.mark.parametrize("spare_rows", [0, 1])
def test_merged_products_equal_separate_ones(order: str, spare_rows: int) -> None:
    """With spare rows, the weights do not fill the storage and the products stay."""
    weights = make_weights(torch.randn(16 + spare_rows, 4), order)
    x = torch.randn(3, 4)
    module = make_products(list(weights.values()), x)
    expected = [x @ weight.T for weight in weights.values()]
    groups = () if spare_rows else ((*order,),)
    context = PassContext(num_tokens=3, facts=(PackedWeights(groups),))
    matches = MERGE_PROJECTIONS.run(module.graph, context)
    assert matches == MERGE_PROJECTIONS.expected(context)
    module.graph.lint()
    module.recompile()
    products = module.graph.find_nodes(op="call_function", target=aten.mm.default)
    assert len(products) == (3 if spare_rows else 1)
    torch.testing.assert_close(module(x, *weights.values()), expected)


def test_weights_in_separate_storages_stay() -> None:
    module = make_products([torch.randn(4, 4), torch.randn(4, 4)], torch.randn(3, 4))
    assert MERGE_PROJECTIONS.run(module.graph, PassContext(num_tokens=3)) == []


def test_are_packed() -> None:
    storage = torch.randn(16, 4)
    first, second, third = storage[:8], storage[8:12], storage[12:]
    assert are_packed([first, second, third])
    assert not are_packed([second, first, third]), "another order"
    assert not are_packed([first, second]), "rows are left over"
    assert not are_packed([first, third]), "a gap"
    assert not are_packed([storage]), "a single weight"
    assert not are_packed([torch.randn(8, 4), torch.randn(8, 4)]), "two storages"
    assert not are_packed([storage[:, :2], storage[:, 2:]]), "not contiguous"
    flat = storage.flatten()
    assert not are_packed([flat[:32].view(8, 4), flat[32:].view(4, 8)]), "other input features"
    assert not are_packed([first, storage[8:].view(torch.int32)]), "other dtypes"
