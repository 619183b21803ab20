"""Compute values that are equal in every layer once per step.

Inductor recomputes a cheap pointwise value inside each kernel that reads it. The cosine and sine
of a rotary embedding and the page and offset of each slot are read in every layer and depend on a
chain of dependent loads, whose latency dominates a kernel over few tokens.

Before::

    cos = cos(angles)
    q_0 = mul(hidden_0, cos); k_0 = ...; q_1 = mul(hidden_1, cos); ...

After::

    cos = cos(angles)
    buffer = materialize(cos)
    q_0 = mul(hidden_0, buffer); k_0 = ...; q_1 = mul(hidden_1, buffer); ...

Matches: results of pointwise ops and indexing on graph inputs alone that are read by
`MIN_READERS` or more nodes into whose kernels Inductor would inline them. Nothing that depends on
a token's embedding matches, because `embedding` is not among these ops. No match is required.

Emits: `materialize`, which returns its argument and has Inductor write it to a buffer.

Assumes: `lower_attention_marker` has run, because slot indices are among the matches.
"""

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from passes.fx_utils import insert_call, is_call_to, is_view
from passes.ops.library import NAMESPACE
from passes.ops.materialize import materialize, register_materialize_lowering
from passes.pipeline import GraphPass, PassContext

aten = torch.ops.aten

MIN_READERS = 4


def _run(graph: Graph, context: PassContext) -> list[str]:
    register_materialize_lowering()
    invariants = _step_invariants(graph)
    matches = [
        node
        for node in graph.nodes
        if node in invariants
        and node.op == "call_function"
        and not is_view(node)
        and _num_readers(node, invariants) >= MIN_READERS
    ]
    for node in matches:
        with graph.inserting_after(node):
            buffer = insert_call(graph, materialize, node)
        node.replace_all_uses_with(
            buffer, delete_user_cb=lambda user: user.target is not materialize
        )
    return [node.name for node in matches]


def _step_invariants(graph: Graph) -> set[Node]:
    """Return graph inputs and all nodes that are computed from them by cheap ops alone."""
    invariants: set[Node] = set()
    for node in graph.nodes:
        is_input = node.op in ("placeholder", "get_attr")
        if is_input or (_is_cheap(node) and invariants.issuperset(node.all_input_nodes)):
            invariants.add(node)
    return invariants


def _is_cheap(node: Node) -> bool:
    """Return whether Inductor would inline the node into the kernels that read it."""
    return (
        is_view(node)
        or is_call_to(node, *_CHEAP)
        or (isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags)
    )


def _num_readers(node: Node, invariants: set[Node]) -> int:
    """Return the number of variant nodes that read the node directly or through views.

    This package's ops are not counted: nothing is inlined into their kernels.
    """
    readers = 0
    for user in node.users:
        if user not in invariants:
            readers += getattr(user.target, "namespace", None) != NAMESPACE
        elif is_view(user):
            readers += _num_readers(user, invariants)
    return readers


# Ops that Inductor inlines although they lack the pointwise tag. index_put is among them because
# the step's tables are updated before they are read.
_CHEAP = (
    torch.ops.prims.iota.default,
    aten.full.default,
    aten.cat.default,
    aten.index.Tensor,
    aten.index_put.default,
    aten.floor_divide.default,
)


def _expected(context: PassContext) -> list[str]:
    return []


HOIST_STEP_INVARIANTS = GraphPass(name="hoist_step_invariants", run=_run, expected=_expected)
