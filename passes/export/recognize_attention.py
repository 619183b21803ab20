"""Attention that a model computes by itself -> one node, a call of a module that the caller makes of each match.

Matches: `softmax(f(q @ k^T)) @ v` in a graph of ATen ops as `torch.export` makes it, and `scaled_dot_product_attention`. What f
does is not read from its ops but asked (see `scores`): it must scale the scores, mask them causally, perhaps in a window, and may
add a bias that grows with a key's position.
Emits: a call of the module on q [1, H, T, D], k [1, G, T, D] and v [1, G, T, E], of v's dtype, that returns [1, T, H, E].
Assumes: one row of T tokens, whose symbol or number is the length of the graph's first input.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from passes.export.score_mod import ScoreMod, infer_score_mod
from passes.fx_utils import backward_slice, is_call_to

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class AttentionMatch:
    """One match: the scores q @ k^T before f, the softmax after it, and what weighs the values."""

    scores: Node
    softmax: Node
    weighted: Node

    @property
    def name(self) -> str:
        """Of the module that it is in."""
        stack = self.softmax.meta.get("nn_module_stack") or {"": ("", None)}
        return str(list(stack.values())[-1][0])


def replace_attention_subgraphs(
    module: GraphModule, make: Callable[[ScoreMod], nn.Module], num_tokens: int
) -> list[str]:
    """Rewrite a graph in place; returns the names of the modules whose attention was replaced.

    Args:
        make: the module to call for a match.
        num_tokens: of the rows on which f is asked; a window as long as that is taken for none.

    Raises:
        UnlikeAttentionError: an f that does something else, in words.
    """
    graph = module.graph
    for node in graph.nodes:
        if is_call_to(node, *_CHECKS):
            graph.erase_node(node)
    for node in graph.nodes:
        if is_call_to(node, aten.baddbmm.default):
            _split_baddbmm(graph, node)
        elif is_call_to(node, aten.scaled_dot_product_attention.default):
            _split_sdpa(graph, node)
    names = list[str]()
    for softmax in [node for node in graph.nodes if is_call_to(node, aten.softmax.int)]:
        match = _match(softmax)
        if match is None:
            continue
        name = f"{match.name}.attend_{len(names)}"
        module.add_submodule(
            name, make(infer_score_mod(module, match.scores, softmax.args[0], num_tokens))
        )
        _replace(graph, match, name)
        names.append(match.name)
    graph.lint()
    module.recompile()
    return names


def _match(softmax: Node) -> AttentionMatch | None:
    if softmax.args[1] not in (-1, softmax.meta["val"].ndim - 1):
        return None
    products = _products_behind(softmax.args[0])
    weighted = _only_product_after(softmax)
    return (
        AttentionMatch(products[0], softmax, weighted)
        if weighted is not None and len(products) == 1
        else None
    )


def _products_behind(node: object) -> list[Node]:
    """The matrix products that a node depends on without another between."""
    assert isinstance(node, Node)
    return [
        behind
        for behind in backward_slice(node, lambda behind: is_call_to(behind, *_PRODUCTS))
        if is_call_to(behind, *_PRODUCTS)
    ]


def _only_product_after(softmax: Node) -> Node | None:
    """The product of its values, as they are, with others."""
    node = softmax
    while True:
        users = list(node.users)
        if len(users) != 1:
            return None
        if is_call_to(users[0], *_PRODUCTS):
            return users[0] if users[0].args[0] is node else None
        if not is_call_to(users[0], *_SAME_VALUES):
            return None
        node = users[0]


def _replace(graph: Graph, match: AttentionMatch, name: str) -> None:
    weighted = match.weighted
    q, keys = match.scores.args[:2]
    values = weighted.args[1]
    assert isinstance(values, Node)
    dtype = values.meta["val"].dtype
    with graph.inserting_before(weighted):
        heads_first = []
        for node, product in (
            (q, match.scores),
            (graph.call_function(aten.transpose.int, (keys, -1, -2)), match.scores),
            (values, weighted),
        ):
            if product.meta["val"].ndim == 3:
                node = graph.call_function(aten.unsqueeze.default, (node, 0))
            heads_first.append(graph.call_function(aten.to.dtype, (node, dtype)))
        attended = graph.call_module(name, tuple(heads_first))
        result = graph.call_function(aten.transpose.int, (attended, 1, 2))
        if weighted.meta["val"].ndim == 3:
            result = graph.call_function(aten.squeeze.dim, (result, 0))
    weighted.replace_all_uses_with(result)
    _erase_unused(graph, weighted, match.scores)


def _erase_unused(graph: Graph, last: Node, first: Node) -> None:
    """Erase what nobody reads any more, ops in place among them, from the last of these back to the first."""
    node = last
    while True:
        before = node.prev
        if not node.users and node.op != "placeholder":
            graph.erase_node(node)
        if node is first:
            return
        node = before


def _split_baddbmm(graph: Graph, node: Node) -> None:
    added, one, other = node.args
    assert isinstance(one, Node)
    with graph.inserting_before(node):
        product = graph.call_function(aten.bmm.default, (one, other))
        product.meta = dict(node.meta)
        scaled = graph.call_function(aten.mul.Tensor, (product, node.kwargs.get("alpha", 1)))
        bias = graph.call_function(aten.mul.Tensor, (added, node.kwargs.get("beta", 1)))
        total = graph.call_function(aten.add.Tensor, (scaled, bias))
    total.meta = dict(node.meta)
    node.replace_all_uses_with(total)
    graph.erase_node(node)


def _split_sdpa(graph: Graph, node: Node) -> None:
    """Only to be matched: what it is made of does not run."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    q, k, v, mask = (given.get(name) for name in names[:4])
    assert isinstance(q, Node)
    assert isinstance(k, Node)
    scores_val: Tensor = q.meta["val"].new_empty(*q.meta["val"].shape[:-1], k.meta["val"].shape[-2])
    with graph.inserting_before(node):
        scores = graph.call_function(
            aten.matmul.default, (q, graph.call_function(aten.transpose.int, (k, -1, -2)))
        )
        scores.meta = {**node.meta, "val": scores_val}
        scale = given.get("scale") or q.meta["val"].shape[-1] ** -0.5
        total = graph.call_function(aten.mul.Tensor, (scores, scale))
        if given.get("is_causal"):
            mask = graph.call_function(
                aten.tril.default, (graph.call_function(aten.ones_like.default, (scores,)),)
            )
            mask = graph.call_function(aten.to.dtype, (mask, torch.bool))
        if isinstance(mask, Node):
            is_bool = given.get("is_causal") or mask.meta["val"].dtype == torch.bool
            outside = (
                (aten.where.ScalarOther, (mask, total, float("-inf")))
                if is_bool
                else (aten.add.Tensor, (total, mask))
            )
            total = graph.call_function(*outside)
        softmax = graph.call_function(aten.softmax.int, (total, -1))
        softmax.meta = {**node.meta, "val": scores_val}
        weighted = graph.call_function(aten.matmul.default, (softmax, v))
        weighted.meta = dict(node.meta)
    node.replace_all_uses_with(weighted)
    graph.erase_node(node)


_CHECKS = (aten._assert_tensor_metadata.default, aten._assert_scalar.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_SAME_VALUES = (
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default,
    aten.dropout.default, aten.view.default, aten.reshape.default, aten.expand.default, aten.clone.default, aten.contiguous.default,
)  # fmt: skip
