"""Linear layers over few tokens -> kernels that do what stands around them on the way.

Matches: `mm` of few tokens with a transposed weight: on a CPU in float32, up to `MAX_TOKENS`; on a GPU in 16 bits, of a single
token any, up to `MAX_TOKENS_GPU` those with small weights, or with no more features out than in, at which cuBLAS is slow. With
- the addition of its result to a residual;
- the root mean square norm that makes its input (the norm of llama and its kin, weight last);
- `silu(gate) * up` of its halves, where gate and up were merged;
the last two on a GPU for a single token or small weights, because each of the kernel's programs norms all tokens.
Only weights that are graph inputs are taken, by way of views: the kernel reads its weight before the kernels ahead of it have ended
(see `passes.ops.pdl`), which may have yet to write one that the graph computes.
Emits: `skinny_linear`, which rounds where the nodes it replaces did, but for the norm on a GPU, whose factor comes after the sum.
Assumes: `merge_projections` has run; the norm stays where something else needs it too.
"""

from typing import NamedTuple

import torch
from torch.fx import Graph, Node

from passes.fx_utils import (
    insert_call,
    is_call_to,
    is_unmutated_input,
    strip_reshapes,
    strip_reshapes_and_casts,
)
from passes.ops.skinny_linear import MAX_TOKENS, MAX_TOKENS_GPU, is_small_weight, skinny_linear
from passes.pipeline import GraphPass, PassContext

aten = torch.ops.aten


class _Norm(NamedTuple):
    tokens: Node
    weight: Node
    eps: float


def _run(graph: Graph, context: PassContext) -> list[str]:
    if context.num_tokens > MAX_TOKENS:
        return []
    products = [
        node
        for node in graph.find_nodes(op="call_function", target=aten.mm.default)
        if _is_served(node)
    ]
    return [_rewrite(graph, product) for product in products]


def _is_served(product: Node) -> bool:
    x, weight = (node.meta["val"] for node in product.args)  # type: ignore[union-attr]
    if weight.stride() != (1, weight.shape[0]) or not is_unmutated_input(product.args[1]):
        return False
    if not x.is_cuda:
        return bool(x.dtype == torch.float32)
    return bool(x.dtype.itemsize == 2) and _pays(x.shape[0], *weight.shape)


def _pays(num_tokens: int, num_in: int, num_out: int) -> bool:
    """Whether our kernel is faster than cuBLAS on a GPU."""
    return num_tokens == 1 or (
        num_tokens <= MAX_TOKENS_GPU and (num_out <= num_in or is_small_weight(num_out, num_in))
    )


def _takes_gate(product: Node) -> bool:
    x, weight = (node.meta["val"] for node in product.args)  # type: ignore[union-attr]
    return bool(not x.is_cuda or x.shape[0] == 1 or is_small_weight(*weight.shape))


def _takes_norm(product: Node) -> bool:
    """Several tokens are multiplied by the norm's weight before they are normed, for which float16 has not the range."""
    value = product.meta["val"]
    return _takes_gate(product) and bool(
        not value.is_cuda or value.shape[0] == 1 or value.dtype == torch.bfloat16
    )


def _rewrite(graph: Graph, product: Node) -> str:
    """Put one call in the place of the product and what it takes in; returns what that was."""
    x, transpose = product.args
    assert isinstance(x, Node)
    assert isinstance(transpose, Node)
    num_tokens, num_in = x.meta["val"].shape
    norm = _norm(x) if _takes_norm(product) else None
    gate = _gated_user(product) if _takes_gate(product) else None
    addition = _addition(product) if gate is None else None
    last = gate or (addition[0] if addition else product)
    with graph.inserting_before(last):
        weight = insert_call(graph, aten.permute.default, transpose, [1, 0])
        tokens = (
            x
            if norm is None
            else insert_call(graph, aten.reshape.default, norm.tokens, [num_tokens, num_in])
        )
        residual = None
        if addition is not None:
            residual = insert_call(
                graph, aten.reshape.default, addition[1], list(product.meta["val"].shape)
            )
        scale, eps = (norm.weight, norm.eps) if norm is not None else (None, 0.0)
        result = insert_call(
            graph, skinny_linear, tokens, weight, scale, eps, residual, gate is not None
        )
        if last is not product:
            result = insert_call(graph, aten.reshape.default, result, list(last.meta["val"].shape))
    last.replace_all_uses_with(result)
    parts = [("norm", norm), ("gate", gate), ("residual", addition)]
    return "+".join(["linear", *(name for name, found in parts if found is not None)])


def _norm(x: Node) -> _Norm | None:
    """The norm that made x: `weight * (tokens * rsqrt(mean(tokens ** 2) + eps))`, whatever the casts between."""
    scaled = strip_reshapes_and_casts(x)
    for weight, normed in _orders(scaled, aten.mul.Tensor):
        if weight.op != "placeholder" or weight.meta["val"].ndim != 1:
            continue
        for tokens, factor in _orders(strip_reshapes_and_casts(normed), aten.mul.Tensor):
            found = _inverse_rms(factor, width=weight.meta["val"].shape[0])
            if (
                found is not None
                and found[0] is strip_reshapes_and_casts(tokens)
                and found[0].meta["val"].dtype == x.meta["val"].dtype
            ):
                return _Norm(found[0], weight, found[1])
    return None


def _inverse_rms(factor: Node, width: int) -> tuple[Node, float] | None:
    """Of `rsqrt(mean(tokens ** 2, -1) + eps)` over so many features, and not over groups of them: tokens and eps."""
    if not is_call_to(factor, aten.rsqrt.default) or not is_call_to(
        factor.args[0], aten.add.Tensor
    ):
        return None
    mean, eps = factor.args[0].args
    if not is_call_to(mean, aten.mean.dim) or mean.args[1] != [-1] or not isinstance(eps, float):
        return None
    square = mean.args[0]
    if (
        not is_call_to(square, aten.pow.Tensor_Scalar)
        or square.args[1] != 2
        or square.meta["val"].shape[-1] != width
    ):
        return None
    return strip_reshapes_and_casts(square.args[0]), eps


def _gated_user(product: Node) -> Node | None:
    """The `silu(gate) * up` over the two halves of the product, if that is all that becomes of it."""
    halves = list(product.users)
    width = product.meta["val"].shape[1]
    if [half.args[1:] for half in halves if is_call_to(half, aten.slice.Tensor)] != [
        (1, 0, width // 2),
        (1, width // 2, width),
    ]:
        return None
    for user in _final_users(halves[1]):
        for activated, up in _orders(user, aten.mul.Tensor):
            if strip_reshapes(up) is halves[1] and _silu_source(activated) is halves[0]:
                return user
    return None


def _silu_source(node: Node) -> Node | None:
    """Of `x / (1 + exp(-x))`, as Inductor decomposes silu: x."""
    division = strip_reshapes_and_casts(node)
    if not is_call_to(division, aten.div.Tensor) or not is_call_to(
        division.args[1], aten.add.Tensor
    ):
        return None
    x = strip_reshapes_and_casts(division.args[0])
    exponential, one = division.args[1].args
    if (
        one != 1
        or not is_call_to(exponential, aten.exp.default)
        or not is_call_to(exponential.args[0], aten.neg.default)
    ):
        return None
    return x if strip_reshapes_and_casts(exponential.args[0].args[0]) is x else None


def _addition(product: Node) -> tuple[Node, Node] | None:
    """The addition of the product, and nothing but that, to something of the same shape and dtype; and that something."""
    users = _final_users(product)
    if len(users) != 1 or users[0].kwargs:
        return None
    for summand, residual in _orders(users[0], aten.add.Tensor):
        value, sum_value = residual.meta["val"], users[0].meta["val"]
        alike = (
            value.shape == sum_value.shape
            and value.dtype == sum_value.dtype == product.meta["val"].dtype
        )
        if (
            strip_reshapes(summand) is product
            and alike
            and sum_value.shape[-1] == product.meta["val"].shape[-1]
        ):
            return users[0], residual
    return None


def _final_users(node: Node) -> list[Node]:
    """Those who use the node, by way of reshapes."""
    return [
        final
        for user in node.users
        for final in (_final_users(user) if is_call_to(user, aten.reshape.default) else [user])
    ]


def _orders(node: Node, target: torch._ops.OpOverload) -> list[tuple[Node, Node]]:
    """The two arguments of a commutative op, in both orders; nothing where it is another op or has a number."""
    if not is_call_to(node, target):
        return []
    left, right = node.args[:2]
    return (
        [(left, right), (right, left)] if isinstance(left, Node) and isinstance(right, Node) else []
    )


FUSE_SKINNY_LINEAR = GraphPass(name="fuse_skinny_linear", run=_run, expected=lambda context: [])
