"""The angles of a rotary embedding -> a multiplication.

transformers computes `inv_freq @ positions`, a matrix product over a dimension of 1, which reaches the GPU as a GEMM of its
own; as a broadcast product it fuses with the cosine and sine that follow.

Matches: `bmm` of [b, m, 1] and [b, 1, n], and `mm` of [m, 1] and [1, n], which Inductor makes of it on a GPU.
Emits: `mul`; the same values bit by bit, since each sum has one term.
Assumes: nothing. One match for each rotary embedding, but none for a single token, where Inductor has decomposed it already.
"""

import torch
from torch.fx import Graph, Node

from passes.fx_utils import insert_call
from passes.pipeline import GraphPass, PassContext

aten = torch.ops.aten


def _run(graph: Graph, context: PassContext) -> list[str]:
    targets = (aten.bmm.default, aten.mm.default)
    products = [
        node
        for target in targets
        for node in graph.find_nodes(op="call_function", target=target)
        if _is_outer(node)
    ]
    for product in products:
        with graph.inserting_before(product):
            product.replace_all_uses_with(insert_call(graph, aten.mul.Tensor, *product.args))
        graph.erase_node(product)
    return [_label(number) for number in range(len(products))]


def _is_outer(product: Node) -> bool:
    left = product.args[0]
    assert isinstance(left, Node)
    return bool(left.meta["val"].shape[-1] == 1)


def _label(number: int) -> str:
    return f"rotary embedding {number}"


def _expected(context: PassContext) -> list[str]:
    return (
        [_label(number) for number in range(context.rotary_embeddings)]
        if context.num_tokens > 1
        else []
    )


ROTARY_OUTER_PRODUCT = GraphPass(name="rotary_outer_product", run=_run, expected=_expected)
