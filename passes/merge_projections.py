"""Merge matrix products of one input with several weights into one product.

Before, for weights that are packed in one storage (see `are_packed`)::

    q = mm(x [T, K], q_weight.T)    # [T, N_q]
    k = mm(x [T, K], k_weight.T)    # [T, N_k]
    v = mm(x [T, K], v_weight.T)    # [T, N_v]

After::

    weight = as_strided(q_weight, [N_q + N_k + N_v, K], [K, 1], 0)
    qkv = mm(x [T, K], weight.T)
    q, k, v = qkv[:, :N_q], qkv[:, N_q : N_q + N_k], qkv[:, N_q + N_k :]

Matches: `mm` nodes of the same tokens with transposed weights that are graph inputs and together
fill one storage: q, k and v projections; gate and up projections. One match is expected for each
group of `PackedWeights`.

Emits: one `mm` and a slice of its result for each replaced product. Each output element is the
same sum as before; a GEMM kernel chosen for the larger width may round it differently.

Assumes: the fake tensors of weights share a fake storage where the weights share one. Inductor's
cache key ignores storages and offsets, so the context's `PackedWeights` must name the weights of
each group in their order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.fx import Graph, Node

from passes.fx_utils import insert_call, is_call_to, strip_reshapes
from passes.pipeline import GraphPass, PassContext

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """The weights of a model that are packed side by side.

    Attributes:
        groups: for each storage that several weights fill, the names of their modules in storage
            order.
    """

    groups: tuple[tuple[str, ...], ...] = ()


def are_packed(weights: Sequence[Tensor]) -> bool:
    """Return whether two or more weights fill one storage in the given order, without gaps.

    They must be contiguous and equal in dtype and in all sizes but the first.
    """
    end = 0
    for weight in weights:
        if not weight.is_contiguous() or weight.storage_offset() != end:
            return False
        end += weight.numel()
    kinds = {
        (weight.untyped_storage()._cdata, weight.dtype, weight.shape[1:]) for weight in weights
    }
    return (
        len(weights) > 1
        and len(kinds) == 1
        and weights[0].untyped_storage().nbytes() == end * weights[0].itemsize
    )


# The source of the tokens, their shape, and the storage of the weight.
_GroupKey = tuple[Node, tuple[int, ...], int]


def _run(graph: Graph, context: PassContext) -> list[str]:
    groups: dict[_GroupKey, list[Node]] = {}
    for product in graph.find_nodes(op="call_function", target=aten.mm.default):
        weight = _input_weight(product)
        if weight is not None:
            tokens = product.args[0]
            shape = tuple(tokens.meta["val"].shape)
            storage = weight.meta["val"].untyped_storage()._cdata
            groups.setdefault((strip_reshapes(tokens), shape, storage), []).append(product)
    packed = [
        group for group in groups.values() if are_packed([*map(_weight, _storage_order(group))])
    ]
    for group in packed:
        _merge(graph, group)
    return _labels(len(packed))


def _input_weight(product: Node) -> Node | None:
    """Return the graph input [N, K] whose transpose is the right operand of an `mm`, if any."""
    transpose = product.args[1]
    if not is_call_to(transpose, aten.permute.default) or transpose.args[1] != [1, 0]:
        return None
    weight = transpose.args[0]
    return weight if isinstance(weight, Node) and weight.op == "placeholder" else None


def _weight(product: Node) -> Tensor:
    """Return the fake weight [N, K] of a product."""
    weight = _input_weight(product)
    assert weight is not None
    value: Tensor = weight.meta["val"]
    return value


def _storage_order(products: list[Node]) -> list[Node]:
    return sorted(products, key=lambda product: _weight(product).storage_offset())


def _merge(graph: Graph, group: list[Node]) -> None:
    """Replace the products of a group by one, inserted before the first in graph order."""
    products = _storage_order(group)
    sizes = [_weight(product).shape[0] for product in products]
    num_in = _weight(products[0]).shape[1]
    first = _input_weight(products[0])
    with graph.inserting_before(group[0]):
        weight = insert_call(
            graph, aten.as_strided.default, first, [sum(sizes), num_in], [num_in, 1], 0
        )
        transpose = insert_call(graph, aten.permute.default, weight, [1, 0])
        merged = insert_call(graph, aten.mm.default, group[0].args[0], transpose)
        parts = [
            insert_call(graph, aten.slice.Tensor, merged, 1, begin, end)
            for begin, end in pairwise(accumulate(sizes, initial=0))
        ]
    for product, part in zip(products, parts, strict=True):
        product.replace_all_uses_with(part)
        graph.erase_node(product)


def _expected(context: PassContext) -> list[str]:
    return _labels(len(context.get(PackedWeights).groups))


def _labels(count: int) -> list[str]:
    return [f"projection group {number}" for number in range(count)]


MERGE_PROJECTIONS = GraphPass(name="merge_projections", run=_run, expected=_expected)
