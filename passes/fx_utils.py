"""Reading and editing graphs: what a node is, whatever views and casts stand before it; new nodes with their fake values."""

import operator
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.node import Argument, Target, map_arg


def insert_call(graph: Graph, target: Target, *args: Argument) -> Node:
    """Insert a call at the graph's insertion point, with `meta["val"]` computed from those of its arguments."""
    node = graph.call_function(target, args)  # type: ignore[arg-type]  # an OpOverload is callable
    values = map_arg(args, lambda argument: argument.meta["val"])
    modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
    with modes[0]:
        node.meta["val"] = target(*values)  # type: ignore[operator]
    return node


def is_call_to(node: object, *targets: Target) -> TypeGuard[Node]:
    """Whether this is a call of one of the targets."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def backward_slice(node: Node, is_end: Callable[[Node], bool]) -> set[Node]:
    """The node and all that it depends on, back to ends and no further."""
    found, open_nodes = set[Node](), [node]
    while open_nodes:
        node = open_nodes.pop()
        if node not in found:
            found.add(node)
            open_nodes += () if is_end(node) else node.all_input_nodes
    return found


def strip_reshapes(node: object) -> Node:
    """The node whose elements these are, in the same order, by way of reshapes."""
    assert isinstance(node, Node)
    while is_call_to(node, *_RESHAPES):
        node = node.args[0]
        assert isinstance(node, Node)
    return node


def strip_reshapes_and_casts(node: object) -> Node:
    """The same, by way of reshapes and casts."""
    assert isinstance(node, Node)
    while is_call_to(node, *_RESHAPES, torch.ops.prims.convert_element_type.default):
        node = node.args[0]
        assert isinstance(node, Node)
    return node


def is_unmutated_input(node: object) -> bool:
    """Whether this is a graph input, or a view of one, that no node of the graph writes to."""
    assert isinstance(node, Node)
    while node.op != "placeholder":
        source = node.all_input_nodes[0] if is_view(node) else None
        if source is None or (
            is_call_to(node, _aten.reshape.default) and not source.meta["val"].is_contiguous()
        ):  # it may copy
            return False
        node = source
    return not _is_written(node)


def is_view(node: Node) -> bool:
    """Whether this reads the same memory as its argument, or is a part of what that gives."""
    return is_call_to(node, operator.getitem, *_RESHAPES) or (
        isinstance(node.target, OpOverload) and node.target.is_view
    )


def _is_written(node: Node) -> bool:
    """Whether a node writes to this one, or to a view of it."""
    return any(_is_written(user) if is_view(user) else _writes(user, node) for user in node.users)


def _writes(user: Node, node: Node) -> bool:
    """Whether the schema of the user's op says that it writes to this argument."""
    if not isinstance(user.target, OpOverload):
        return False
    arguments = zip(user.target._schema.arguments, user.args, strict=False)
    return any(
        argument.alias_info is not None and argument.alias_info.is_write
        for argument, given in arguments
        if given is node
    )


_aten = torch.ops.aten
_RESHAPES = (_aten.reshape.default, _aten.view.default, _aten._unsafe_view.default)
