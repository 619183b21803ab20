"""Replace attention that a model computes itself by calls of a module, in an exported graph.

Before::

    scores = q @ k.transpose(-1, -2)             # [1, H, T, T], or all without the batch dim
    weights = softmax(f(scores), -1)             # f: a causal mask, a scale, maybe ALiBi
    out = weights @ v                            # [1, H, T, E]

After::

    out = attend(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2)

Matches: `softmax(f(q @ k^T)) @ v` in a graph of ATen ops made by `torch.export`, and
`scaled_dot_product_attention`. The function f is evaluated rather than matched (see
`passes.export.score_mod`).

Emits: calls of a module that the caller makes for each match. Its arguments are q [1, H, T, D],
k [1, G, T, D] and v [1, G, T, E] in the dtype of v; it returns [1, T, H, E].

Assumes: one row of T tokens, T being the length of the graph's first input.
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
    """One match.

    Attributes:
        scores: the product of queries and keys.
        softmax: the softmax of the modified scores.
        weighted: the product of the softmax and the values.
    """

    scores: Node
    softmax: Node
    weighted: Node

    @property
    def name(self) -> str:
        """Qualified name of the module that computes the softmax."""
        stack = self.softmax.meta.get("nn_module_stack") or {"": ("", None)}
        return str(list(stack.values())[-1][0])


def replace_attention_subgraphs(
    module: GraphModule, make: Callable[[ScoreMod], nn.Module], num_tokens: int
) -> list[str]:
    """Replace all matches in place; return the names of the modules that contain them.

    Args:
        module: an exported module.
        make: returns the module to call for a match.
        num_tokens: number of tokens for which the function f is evaluated. A window of at least
            that many tokens is not detected.

    Raises:
        UnsupportedScoreModError: f is of another form than `ScoreMod`.
        NotImplementedError: f depends on weights on the meta device.
    """
    graph = module.graph
    _normalize(graph)
    names = list[str]()
    for softmax in [node for node in graph.nodes if is_call_to(node, aten.softmax.int)]:
        match = _match(softmax)
        if match is None:
            continue
        score_mod = infer_score_mod(module, match.scores, softmax.args[0], num_tokens)
        target = f"{match.name}.attend_{len(names)}"
        module.add_submodule(target, make(score_mod))
        _replace(graph, match, target)
        names.append(match.name)
    graph.lint()
    module.recompile()
    return names


def _normalize(graph: Graph) -> None:
    """Erase assertions and decompose ops that combine the product with what follows it."""
    for node in graph.nodes:
        if is_call_to(node, *_ASSERTIONS):
            graph.erase_node(node)
    for node in graph.nodes:
        if is_call_to(node, aten.baddbmm.default):
            _decompose_baddbmm(graph, node)
        elif is_call_to(node, aten.scaled_dot_product_attention.default):
            _decompose_sdpa(graph, node)


def _match(softmax: Node) -> AttentionMatch | None:
    if softmax.args[1] not in (-1, softmax.meta["val"].ndim - 1):
        return None
    products = _nearest_products(softmax.args[0])
    weighted = _weighted_values(softmax)
    if weighted is None or len(products) != 1:
        return None
    return AttentionMatch(products[0], softmax, weighted)


def _nearest_products(node: object) -> list[Node]:
    """Return the matrix products on which a node depends without another product between."""
    assert isinstance(node, Node)
    ancestors = backward_slice(node, lambda ancestor: is_call_to(ancestor, *_PRODUCTS))
    return [ancestor for ancestor in ancestors if is_call_to(ancestor, *_PRODUCTS)]


def _weighted_values(softmax: Node) -> Node | None:
    """Return the product whose left operand is the unchanged softmax, if it is the only use."""
    node = softmax
    while True:
        users = list(node.users)
        if len(users) != 1:
            return None
        if is_call_to(users[0], *_PRODUCTS):
            return users[0] if users[0].args[0] is node else None
        if not is_call_to(users[0], *_IDENTITIES):
            return None
        node = users[0]


def _replace(graph: Graph, match: AttentionMatch, target: str) -> None:
    """Insert a call of the submodule `target` before the match, and erase the match."""
    weighted = match.weighted
    q, k_transposed = match.scores.args[:2]
    values = weighted.args[1]
    assert isinstance(values, Node)
    dtype = values.meta["val"].dtype
    scores_have_batch = match.scores.meta["val"].ndim != 3
    output_has_batch = weighted.meta["val"].ndim != 3
    with graph.inserting_before(weighted):
        k = graph.call_function(aten.transpose.int, (k_transposed, -1, -2))
        arguments = []
        for node, has_batch in (
            (q, scores_have_batch),
            (k, scores_have_batch),
            (values, output_has_batch),
        ):
            if not has_batch:
                node = graph.call_function(aten.unsqueeze.default, (node, 0))
            arguments.append(graph.call_function(aten.to.dtype, (node, dtype)))
        attended = graph.call_module(target, tuple(arguments))
        result = graph.call_function(aten.transpose.int, (attended, 1, 2))
        if not output_has_batch:
            result = graph.call_function(aten.squeeze.dim, (result, 0))
    weighted.replace_all_uses_with(result)
    _erase_unused(graph, weighted, match.scores)


def _erase_unused(graph: Graph, last: Node, first: Node) -> None:
    """Erase nodes without users from `last` back to `first`, including in-place ops.

    Dead code elimination would keep the latter.
    """
    node = last
    while True:
        previous = node.prev
        if not node.users and node.op != "placeholder":
            graph.erase_node(node)
        if node is first:
            return
        node = previous


def _decompose_baddbmm(graph: Graph, node: Node) -> None:
    """Replace `baddbmm` by `alpha * bmm(left, right) + beta * added`."""
    added, left, right = node.args
    assert isinstance(left, Node)
    with graph.inserting_before(node):
        product = graph.call_function(aten.bmm.default, (left, right))
        product.meta = dict(node.meta)
        scaled = graph.call_function(aten.mul.Tensor, (product, node.kwargs.get("alpha", 1)))
        bias = graph.call_function(aten.mul.Tensor, (added, node.kwargs.get("beta", 1)))
        total = graph.call_function(aten.add.Tensor, (scaled, bias))
    total.meta = dict(node.meta)
    node.replace_all_uses_with(total)
    graph.erase_node(node)


def _decompose_sdpa(graph: Graph, node: Node) -> None:
    """Replace `scaled_dot_product_attention` by the ops that `_match` recognizes.

    The match is replaced later, so these ops do not run, except for the evaluation of f.
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    q, k, v = given["query"], given["key"], given["value"]
    assert isinstance(q, Node)
    assert isinstance(k, Node)
    q_val, num_keys = q.meta["val"], k.meta["val"].shape[-2]
    scores_val: Tensor = q_val.new_empty(*q_val.shape[:-1], num_keys)
    with graph.inserting_before(node):
        k_transposed = graph.call_function(aten.transpose.int, (k, -1, -2))
        scores = graph.call_function(aten.matmul.default, (q, k_transposed))
        scores.meta = {**node.meta, "val": scores_val}
        scale = given.get("scale") or q_val.shape[-1] ** -0.5
        total = graph.call_function(aten.mul.Tensor, (scores, scale))
        total = _apply_mask(graph, scores, total, given.get("attn_mask"), given.get("is_causal"))
        softmax = graph.call_function(aten.softmax.int, (total, -1))
        softmax.meta = {**node.meta, "val": scores_val}
        weighted = graph.call_function(aten.matmul.default, (softmax, v))
        weighted.meta = dict(node.meta)
    node.replace_all_uses_with(weighted)
    graph.erase_node(node)


def _apply_mask(graph: Graph, scores: Node, total: Node, mask: object, is_causal: object) -> Node:
    """Insert the mask of `scaled_dot_product_attention`; return the masked scores."""
    if is_causal:
        ones = graph.call_function(aten.ones_like.default, (scores,))
        lower = graph.call_function(aten.tril.default, (ones,))
        mask = graph.call_function(aten.to.dtype, (lower, torch.bool))
    if not isinstance(mask, Node):
        return total
    if is_causal or mask.meta["val"].dtype == torch.bool:
        return graph.call_function(aten.where.ScalarOther, (mask, total, float("-inf")))
    return graph.call_function(aten.add.Tensor, (total, mask))


_ASSERTIONS = (aten._assert_tensor_metadata.default, aten._assert_scalar.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default)
# Ops that leave values unchanged, or round them.
_IDENTITIES = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    aten.dropout.default,
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.clone.default,
    aten.contiguous.default,
)
