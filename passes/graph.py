"""Editing graphs: a new node with the fake value that later passes and lowering read from it."""

from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.node import Argument, Target, map_arg


def emit(graph: Graph, target: Target, *args: Argument) -> Node:
    """Insert a call at the graph's insertion point, with `meta["val"]` computed from those of its arguments."""
    node = graph.call_function(target, args)  # type: ignore[arg-type]  # an OpOverload is callable
    values = map_arg(args, lambda argument: argument.meta["val"])
    modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
    with modes[0]:
        node.meta["val"] = target(*values)  # type: ignore[operator]
    return node
