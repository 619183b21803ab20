"""Matrix products of one input with several weights -> one product with all of them.

Matches: `mm` nodes of the same tokens with transposed weights that together fill one storage, as `compiled_llm.models.weight_packing`
lays them: q, k and v; gate and up.
Emits: one `mm` with the weights read as one (`as_strided` over the first), and a slice of its result for each.
Assumes: weights are graph inputs, whose fake tensors share a fake storage where the real ones share one. Inductor's cache does not
look at storages and offsets, so that `PassContext.merged_projections` must name the weights that share one, in their order. Each
output element is the same sum as before; a GEMM kernel chosen for another width may round it otherwise.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import Graph, Node

from passes.fx_utils import insert_call, is_call_to, strip_reshapes
from passes.pipeline import GraphPass, PassContext

aten = torch.ops.aten


def _run(graph: Graph, context: PassContext) -> list[str]:
    groups: dict[tuple[Node, tuple[int, ...], int], list[Node]] = {}
    for product in graph.find_nodes(op="call_function", target=aten.mm.default):
        weight = _transposed_weight(product)
        if weight is not None:
            tokens, storage = product.args[0], weight.meta["val"].untyped_storage()
            groups.setdefault(
                (strip_reshapes(tokens), tuple(tokens.meta["val"].shape), storage._cdata), []
            ).append(product)
    merged = [group for group in groups.values() if len(group) > 1 and _are_packed(group)]
    for group in merged:
        _merge(graph, group)
    return [_label(number) for number in range(len(merged))]


def _transposed_weight(product: Node) -> Node | None:
    """The weight [N, K] of an `mm` with a graph input transposed."""
    transpose = product.args[1]
    if not is_call_to(transpose, aten.permute.default) or transpose.args[1] != [1, 0]:
        return None
    weight = transpose.args[0]
    return weight if isinstance(weight, Node) and weight.op == "placeholder" else None


def _value(product: Node) -> Tensor:
    weight = _transposed_weight(product)
    assert weight is not None
    value: Tensor = weight.meta["val"]
    return value


def are_packed(weights: Sequence[Tensor]) -> bool:
    """Whether the weights, more than one, are alike and follow each other in one storage, from its beginning to its end."""
    end = 0
    for weight in weights:
        if not weight.is_contiguous() or weight.storage_offset() != end:
            return False
        end += weight.numel()
    alike = {
        (weight.untyped_storage()._cdata, weight.dtype, weight.shape[1:]) for weight in weights
    }
    return (
        len(weights) > 1
        and len(alike) == 1
        and weights[0].untyped_storage().nbytes() == end * weights[0].itemsize
    )


def _are_packed(group: list[Node]) -> bool:
    return are_packed(sorted(map(_value, group), key=lambda weight: weight.storage_offset()))


def _merge(graph: Graph, group: list[Node]) -> None:
    """Replace the products; the new one stands where the first stood, whose input exists by then."""
    products = sorted(group, key=lambda product: _value(product).storage_offset())
    sizes = [_value(product).shape[0] for product in products]
    bounds = list(pairwise([0, *(sum(sizes[: n + 1]) for n in range(len(sizes)))]))
    with graph.inserting_before(group[0]):
        first = _transposed_weight(products[0])
        assert first is not None
        num_in = _value(products[0]).shape[1]
        weight = insert_call(
            graph, aten.as_strided.default, first, [sum(sizes), num_in], [num_in, 1], 0
        )
        product = insert_call(
            graph,
            aten.mm.default,
            group[0].args[0],
            insert_call(graph, aten.permute.default, weight, [1, 0]),
        )
        parts = [
            insert_call(graph, aten.slice.Tensor, product, 1, begin, end) for begin, end in bounds
        ]
    for old, part in zip(products, parts, strict=True):
        old.replace_all_uses_with(part)
        graph.erase_node(old)


def _label(number: int) -> str:
    return f"projection group {number}"


MERGE_PROJECTIONS = GraphPass(
    name="merge_projections",
    run=_run,
    expected=lambda context: [_label(number) for number in range(len(context.merged_projections))],
)
