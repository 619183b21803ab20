"""Compute the angles of a rotary embedding by a broadcast product instead of a GEMM.

transformers computes the angles as `inv_freq @ position_ids`, a matrix product whose inner
dimension is 1. On a GPU that is a GEMM launch; a pointwise product fuses with the cosine and sine
that read it.

Before::

    angles = bmm(inv_freq [1, D / 2, 1], position_ids [1, 1, T])

After::

    angles = mul(inv_freq [1, D / 2, 1], position_ids [1, 1, T])

Matches: `bmm` of [b, m, 1] and [b, 1, n], and `mm` of [m, 1] and [1, n], to which Inductor
simplifies it on a GPU. One match is expected for each of the model's `RotaryEmbeddings`, and none
for a single token, for which Inductor has decomposed the product before the pass runs.

Emits: `mul`. Values are equal bit by bit, because each sum has one term.
"""

from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from passes.fx_utils import insert_call
from passes.pipeline import GraphPass, PassContext

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class RotaryEmbeddings:
    """The rotary embeddings of a model.

    Attributes:
        count: number of rotary embeddings that a step computes; layers may share one.
    """

    count: int = 0


def _run(graph: Graph, context: PassContext) -> list[str]:
    targets = (aten.bmm.default, aten.mm.default)
    products = [
        node
        for target in targets
        for node in graph.find_nodes(op="call_function", target=target)
        if _is_outer_product(node)
    ]
    for product in products:
        with graph.inserting_before(product):
            broadcast = insert_call(graph, aten.mul.Tensor, *product.args)
        product.replace_all_uses_with(broadcast)
        graph.erase_node(product)
    return _labels(len(products))


def _is_outer_product(product: Node) -> bool:
    left = product.args[0]
    assert isinstance(left, Node)
    return bool(left.meta["val"].shape[-1] == 1)


def _expected(context: PassContext) -> list[str]:
    return _labels(context.get(RotaryEmbeddings).count) if context.num_tokens > 1 else []


def _labels(count: int) -> list[str]:
    return [f"rotary embedding {number}" for number in range(count)]


ROTARY_OUTER_PRODUCT = GraphPass(name="rotary_outer_product", run=_run, expected=_expected)
