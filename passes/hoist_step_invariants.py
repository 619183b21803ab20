"""What depends on positions and tables alone -> computed once a step, not again in the kernels of every layer.

Inductor puts a cheap pointwise value into each kernel that reads it. A rotary embedding's cosine and sine and the places of
the step's keys and values are read in every layer, and have a chain of dependent loads behind them, which a kernel over few
tokens waits for most of its time.

Matches: values that no token's embedding enters, made by pointwise ops and indexing, and read by `MIN_READERS` or more nodes
that Inductor would put them into.
Emits: `materialize`, the same value.
Assumes: `lower_attention_marker` has run.
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
    of_step: set[Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr") or (
            _is_cheap(node) and of_step.issuperset(node.all_input_nodes)
        ):
            of_step.add(node)
    values = [
        node
        for node in graph.nodes
        if node in of_step and node.op == "call_function" and not is_view(node)
    ]
    often = [node for node in values if _num_readers(node, of_step) >= MIN_READERS]
    for node in often:
        with graph.inserting_after(node):
            buffer = insert_call(graph, materialize, node)
        node.replace_all_uses_with(
            buffer, delete_user_cb=lambda user: user.target is not materialize
        )
    return [node.name for node in often]


def _is_cheap(node: Node) -> bool:
    return (
        is_view(node)
        or is_call_to(node, *_CHEAP)
        or (isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags)
    )


def _num_readers(node: Node, of_step: set[Node]) -> int:
    """How many nodes that a token's embedding enters read it, by way of views or not."""
    readers = 0
    for user in node.users:
        if user not in of_step:
            readers += getattr(user.target, "namespace", None) != NAMESPACE
        elif is_view(user):
            readers += _num_readers(user, of_step)
    return readers


# What is as good as pointwise, but not marked so. A put is among them because the step's tables are updated before they are read.
_CHEAP = (
    torch.ops.prims.iota.default,
    aten.full.default,
    aten.cat.default,
    aten.index.Tensor,
    aten.index_put.default,
    aten.floor_divide.default,
)

HOIST_STEP_INVARIANTS = GraphPass(
    name="hoist_step_invariants", run=_run, expected=lambda context: []
)
