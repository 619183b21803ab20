"""Fuse linear layers over few tokens with the ops before and after them into one kernel.

Before, for one token of a llama layer (T tokens, K features in, N features out)::

    h = mul(norm_weight, x * rsqrt(mean(x ** 2, -1) + eps))    # RMSNorm, casts not shown
    y = mm(h [T, K], weight.T)
    out = add(residual [T, N], y)

    gate_up = mm(h [T, K], gate_up_weight.T)                   # [T, 2 N]
    out = mul(silu(gate_up[:, :N]), gate_up[:, N:])

After::

    out = skinny_linear(x, weight, norm_weight, eps, residual, gated=False)

    out = skinny_linear(x, gate_up_weight, norm_weight, eps, None, gated=True)

Matches: `mm` with a transposed weight of

- float32 on a CPU, for up to `MAX_TOKENS` tokens;
- 16 bits on a GPU, for one token with any weight, and for up to `MAX_TOKENS_GPU` tokens with a
  small weight or one with no more features out than in, for which cuBLAS is slower.

and what surrounds it, each if present: the RMSNorm of its input, `silu(gate) * up` of the halves
of its result, the addition of its result to a residual. On a GPU, norm and gate are fused for one
token or a small weight only, because each program of the kernel normalizes all tokens. No match
is required.

Emits: `skinny_linear`, which rounds where the replaced nodes round, except that a norm's factor is
applied after the sum on a GPU. A norm with other users stays in the graph for them.

Assumes: `merge_projections` has run, so that gate and up are halves of one product. The weight is
an unmutated graph input or a view of one: with programmatic dependent launch the kernel reads it
while preceding kernels still run (see `passes.ops.pdl`).
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
    """An RMSNorm: its input, its weight [K] and its epsilon."""

    tokens: Node
    weight: Node
    eps: float


class _Residual(NamedTuple):
    """An addition of a product to another node of the same shape and dtype."""

    addition: Node
    value: Node


def _run(graph: Graph, context: PassContext) -> list[str]:
    if context.num_tokens > MAX_TOKENS:
        return []
    products = graph.find_nodes(op="call_function", target=aten.mm.default)
    supported = [product for product in products if _is_supported(product)]
    return [_fuse(graph, product) for product in supported]


def _is_supported(product: Node) -> bool:
    x, weight = (node.meta["val"] for node in product.args)  # type: ignore[union-attr]
    if weight.stride() != (1, weight.shape[0]) or not is_unmutated_input(product.args[1]):
        return False
    if not x.is_cuda:
        return bool(x.dtype == torch.float32)
    return bool(x.dtype.itemsize == 2) and _is_faster_than_cublas(x.shape[0], *weight.shape)


def _is_faster_than_cublas(num_tokens: int, num_in: int, num_out: int) -> bool:
    return num_tokens == 1 or (
        num_tokens <= MAX_TOKENS_GPU and (num_out <= num_in or is_small_weight(num_out, num_in))
    )


def _can_fuse_gate(product: Node) -> bool:
    x, weight = (node.meta["val"] for node in product.args)  # type: ignore[union-attr]
    return bool(not x.is_cuda or x.shape[0] == 1 or is_small_weight(*weight.shape))


def _can_fuse_norm(product: Node) -> bool:
    """Return whether the kernel can normalize the product's input.

    Several tokens are multiplied by the norm's weight before they are normalized. Results may
    exceed the range of float16.
    """
    value = product.meta["val"]
    in_range = not value.is_cuda or value.shape[0] == 1 or value.dtype == torch.bfloat16
    return _can_fuse_gate(product) and bool(in_range)


def _fuse(graph: Graph, product: Node) -> str:
    """Replace a product and what surrounds it by one call; return a label that names the parts."""
    x = product.args[0]
    assert isinstance(x, Node)
    norm = _match_norm(x) if _can_fuse_norm(product) else None
    gated = _match_gate(product) if _can_fuse_gate(product) else None
    residual = _match_residual(product) if gated is None else None
    last = gated or (residual.addition if residual else product)
    with graph.inserting_before(last):
        result = _insert_skinny_linear(graph, product, norm, residual, gated is not None)
        if last is not product:
            shape = list(last.meta["val"].shape)
            result = insert_call(graph, aten.reshape.default, result, shape)
    last.replace_all_uses_with(result)
    parts = [("norm", norm), ("gate", gated), ("residual", residual)]
    return "+".join(["linear", *(name for name, found in parts if found is not None)])


def _insert_skinny_linear(
    graph: Graph, product: Node, norm: _Norm | None, residual: _Residual | None, gated: bool
) -> Node:
    x, transpose = product.args
    assert isinstance(x, Node)
    weight = insert_call(graph, aten.permute.default, transpose, [1, 0])
    scale, eps = None, 0.0
    if norm is not None:
        scale, eps = norm.weight, norm.eps
        x = insert_call(graph, aten.reshape.default, norm.tokens, list(x.meta["val"].shape))
    added = None
    if residual is not None:
        shape = list(product.meta["val"].shape)
        added = insert_call(graph, aten.reshape.default, residual.value, shape)
    return insert_call(graph, skinny_linear, x, weight, scale, eps, added, gated)


def _match_norm(x: Node) -> _Norm | None:
    """Match `weight * (tokens * rsqrt(mean(tokens ** 2, -1) + eps))`; casts may be anywhere."""
    for weight, normalized in _operand_orders(strip_reshapes_and_casts(x), aten.mul.Tensor):
        if weight.op != "placeholder" or weight.meta["val"].ndim != 1:
            continue
        width = weight.meta["val"].shape[0]
        product = strip_reshapes_and_casts(normalized)
        for operand, factor in _operand_orders(product, aten.mul.Tensor):
            found = _match_inverse_rms(factor, width)
            if found is None:
                continue
            tokens, eps = found
            same_dtype = tokens.meta["val"].dtype == x.meta["val"].dtype
            if tokens is strip_reshapes_and_casts(operand) and same_dtype:
                return _Norm(tokens, weight, eps)
    return None


def _match_inverse_rms(factor: Node, width: int) -> tuple[Node, float] | None:
    """Match `rsqrt(mean(tokens ** 2, -1) + eps)`; return tokens and eps.

    The mean must be over all `width` features: the norm of groups of features is another function.
    """
    if not is_call_to(factor, aten.rsqrt.default):
        return None
    shifted = factor.args[0]
    if not is_call_to(shifted, aten.add.Tensor):
        return None
    mean, eps = shifted.args
    if not is_call_to(mean, aten.mean.dim) or mean.args[1] != [-1] or not isinstance(eps, float):
        return None
    square = mean.args[0]
    if not is_call_to(square, aten.pow.Tensor_Scalar) or square.args[1] != 2:
        return None
    if square.meta["val"].shape[-1] != width:
        return None
    return strip_reshapes_and_casts(square.args[0]), eps


def _match_gate(product: Node) -> Node | None:
    """Match `silu(gate) * up` of the two halves of a product."""
    width = product.meta["val"].shape[1]
    halves = list(product.users)
    bounds = [half.args[1:] for half in halves if is_call_to(half, aten.slice.Tensor)]
    if bounds != [(1, 0, width // 2), (1, width // 2, width)]:
        return None
    gate, up = halves[:2]
    for user in _users_past_reshapes(up):
        for activated, other in _operand_orders(user, aten.mul.Tensor):
            if strip_reshapes(other) is up and _match_silu(activated) is gate:
                return user
    return None


def _match_silu(node: Node) -> Node | None:
    """Match `x / (1 + exp(-x))`, to which Inductor decomposes silu; return x."""
    division = strip_reshapes_and_casts(node)
    if not is_call_to(division, aten.div.Tensor):
        return None
    numerator, denominator = division.args
    if not is_call_to(denominator, aten.add.Tensor):
        return None
    exponential, one = denominator.args
    if one != 1 or not is_call_to(exponential, aten.exp.default):
        return None
    negation = exponential.args[0]
    if not is_call_to(negation, aten.neg.default):
        return None
    x = strip_reshapes_and_casts(numerator)
    return x if strip_reshapes_and_casts(negation.args[0]) is x else None


def _match_residual(product: Node) -> _Residual | None:
    """Match the addition of a product that has no other users to a value of its shape and dtype."""
    users = _users_past_reshapes(product)
    if len(users) != 1 or users[0].kwargs:
        return None
    addition = users[0]
    for summand, residual in _operand_orders(addition, aten.add.Tensor):
        value, total, out = (node.meta["val"] for node in (residual, addition, product))
        same_shape = value.shape == total.shape and total.shape[-1] == out.shape[-1]
        same_dtype = value.dtype == total.dtype == out.dtype
        if strip_reshapes(summand) is product and same_shape and same_dtype:
            return _Residual(addition, residual)
    return None


def _users_past_reshapes(node: Node) -> list[Node]:
    """Return the users of a node; in place of a reshape, its own users."""
    return [
        final
        for user in node.users
        for final in (
            _users_past_reshapes(user) if is_call_to(user, aten.reshape.default) else [user]
        )
    ]


def _operand_orders(node: Node, target: torch._ops.OpOverload) -> list[tuple[Node, Node]]:
    """Return the operands of a commutative op in both orders.

    The list is empty if the node is another op or an operand is a number.
    """
    if not is_call_to(node, target):
        return []
    left, right = node.args[:2]
    if not isinstance(left, Node) or not isinstance(right, Node):
        return []
    return [(left, right), (right, left)]


def _expected(context: PassContext) -> list[str]:
    return []


FUSE_SKINNY_LINEAR = GraphPass(name="fuse_skinny_linear", run=_run, expected=_expected)
