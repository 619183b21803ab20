"""Helpers to match and edit FX graphs of ATen ops whose nodes carry fake tensors."""

import operator
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.node import Argument, Target, map_arg


def insert_call(graph: Graph, target: Target, *args: Argument) -> Node:
    """Insert a call at the graph's insertion point and compute its `meta["val"]`.

    At least one argument must be a node with a fake tensor as its `meta["val"]`.
    """
    node = graph.call_function(target, args)  # type: ignore[arg-type]  # an OpOverload is callable
    values = map_arg(args, lambda argument: argument.meta["val"])
    modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
    with modes[0]:
        node.meta["val"] = target(*values)  # type: ignore[operator]
    return node


def is_call_to(node: object, *targets: Target) -> TypeGuard[Node]:
    """Return whether `node` is a `call_function` node of one of the targets."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def backward_slice(node: Node, is_end: Callable[[Node], bool]) -> set[Node]:
    """Return the node and its transitive inputs; inputs of nodes where `is_end` are not followed.

    End nodes are included.
    """
    found = set[Node]()
    pending = [node]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += () if is_end(node) else node.all_input_nodes
    return found


def strip_reshapes(node: object) -> Node:
    """Return the node from which `node` is computed by reshapes alone."""
    assert isinstance(node, Node)
    while is_call_to(node, *_RESHAPES):
        node = node.args[0]
        assert isinstance(node, Node)
    return node


def strip_reshapes_and_casts(node: object) -> Node:
    """Return the node from which `node` is computed by reshapes and dtype conversions alone."""
    assert isinstance(node, Node)
    while is_call_to(node, *_RESHAPES, torch.ops.prims.convert_element_type.default):
        node = node.args[0]
        assert isinstance(node, Node)
    return node


def is_unmutated_input(node: object) -> bool:
    """Return whether `node` is a graph input that the graph does not mutate, or a view of one."""
    assert isinstance(node, Node)
    while node.op != "placeholder":
        source = node.all_input_nodes[0] if is_view(node) else None
        # A reshape of a tensor that is not contiguous may copy it.
        if source is None or (
            is_call_to(node, _aten.reshape.default) and not source.meta["val"].is_contiguous()
        ):
            return False
        node = source
    return not _is_mutated(node)


def is_view(node: Node) -> bool:
    """Return whether `node` aliases its argument, or is an element of its argument's results."""
    return is_call_to(node, operator.getitem, *_RESHAPES) or (
        isinstance(node.target, OpOverload) and node.target.is_view
    )


def _is_mutated(node: Node) -> bool:
    """Return whether some node writes to `node` or to a view of it."""
    return any(_is_mutated(user) if is_view(user) else _mutates(user, node) for user in node.users)


def _mutates(user: Node, node: Node) -> bool:
    """Return whether the schema of `user` declares a write to its argument `node`."""
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
