"""A digest of the graph that Dynamo traces of a step, by which a compiled step is known to be of the model at hand.

Equal digests mean equal graphs: the same ops, with the same constants, on tensors that are found in the same places and have the
same shapes, strides and dtypes. What tensors hold is not compiled in, so it does not count, but for constants of the graph itself.
Whatever changes what a model computes (a hook, a patched method, an attribute, another activation) changes the graph.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo import convert_frame
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

_OPAQUE_NAMESPACES = {
    "aten",
    "prims",
    "prim",
    "compiled_llm",
}  # their versions, or their source, are in an artifact's key
_SCALARS = (type(None), bool, int, float, complex, str, bytes, type(...))
_TORCH_VALUES = (torch.dtype, torch.device, torch.layout, torch.memory_format)


class UndeterminedGraphError(ValueError):
    """The graph calls code that it does not show, so that equal graphs may compute different things."""


class _TracedError(Exception):
    """Ends a compilation after its tracing."""


def digest_of(module: GraphModule) -> str:
    """SHA-256 of a graph, in hexadecimal digits. Raises UndeterminedGraphError."""
    digest, numbers = hashlib.sha256(), dict[Node, int]()
    try:
        for node in module.graph.nodes:
            line = (
                node.op,
                _target(node, module),
                _describe(node.args, numbers),
                _describe(node.kwargs, numbers),
            )
            digest.update(f"{line}\n".encode())
            numbers[node] = len(numbers)
    except (
        AttributeError,
        RuntimeError,
        TypeError,
    ) as error:  # a function without a name, a tensor without strides
        raise UndeterminedGraphError(
            f"the graph holds something that has no description: {error}"
        ) from error
    return digest.hexdigest()


def trace(compile_step: Callable[[], object]) -> str:
    """The digest of what a call would compile; the call goes no further than to trace it.

    Raises:
        UndeterminedGraphError: the graph does not show all that it computes.
        Exception: whatever tracing raises.
    """

    def stop(module: GraphModule) -> None:
        modules.append(module)
        raise _TracedError

    modules: list[GraphModule] = []
    with _each_graph(stop), suppress(_TracedError):
        compile_step()
    return digest_of(modules[-1])


@contextmanager
def record_digests() -> Iterator[list[str]]:
    """Fill a list with the digest of each graph that is traced while this is open; "" where that is undetermined."""

    def note(module: GraphModule) -> None:
        try:
            digests.append(digest_of(module))
        except UndeterminedGraphError:
            digests.append("")

    digests: list[str] = []
    with _each_graph(note):
        yield digests


@contextmanager
def _each_graph(then: Callable[[GraphModule], None]) -> Iterator[None]:
    capture = convert_frame.fullgraph_capture

    def capture_and_show(*args: Any, **kwargs: Any) -> Any:
        captured = capture(*args, **kwargs)
        assert captured.backend_input is not None
        then(captured.backend_input.graph_module)
        return captured

    with patch.object(convert_frame, "fullgraph_capture", capture_and_show):
        yield


def _target(node: Node, module: GraphModule) -> str:
    if node.op == "placeholder":
        return f"{node.target} {_tensor(node.meta.get('example_value'))}"
    if node.op == "get_attr":
        value: Any = module
        for name in str(node.target).split("."):
            value = getattr(value, name)
        return (
            digest_of(value)
            if isinstance(value, GraphModule)
            else f"{_tensor(value)} {_content(value)}"
        )
    if node.op == "call_function":
        return _function(node.target)
    if node.op == "call_module":
        raise UndeterminedGraphError(f"the graph calls a module, {node.target}, as a whole")
    return str(node.target)


def _function(function: Any) -> str:
    """The name of a function of torch's or Python's own, which is the same wherever their versions are."""
    if isinstance(function, OpOverloadPacket):
        return ",".join(_function(getattr(function, overload)) for overload in function.overloads())
    if isinstance(function, OpOverload):
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(
            function.name(), "CompositeImplicitAutograd"
        )
        if composite and function.namespace not in _OPAQUE_NAMESPACES:
            raise UndeterminedGraphError(
                f"the graph calls {function}, which is compiled from code of its own"
            )
        return str(function.name())
    if isinstance(function, HigherOrderOperator):
        if "triton_kernel" in str(function.name()):
            raise UndeterminedGraphError(
                f"the graph calls a Triton kernel of the model's own ({function.name()})"
            )
        return str(function.name())
    owner = getattr(function, "__objclass__", None)
    module = str(getattr(function, "__module__", None) or getattr(owner, "__module__", None))
    if module.partition(".")[0] not in ("torch", "_operator", "operator", "math", "builtins"):
        raise UndeterminedGraphError(
            f"the graph calls {module}.{getattr(function, '__name__', function)}, which it does not show"
        )
    return f"{module}.{getattr(owner, '__name__', '')}.{function.__name__}"


def _describe(value: Any, numbers: dict[Node, int]) -> str:
    """An argument, in words that are the same in every process."""
    if isinstance(value, Node):
        return f"%{numbers[value]}"
    if type(value) in _SCALARS or isinstance(value, _TORCH_VALUES):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}[{', '.join(_describe(part, numbers) for part in value)}]"
    if isinstance(value, dict):
        return f"dict[{', '.join(f'{name!r}: {_describe(part, numbers)}' for name, part in value.items())}]"
    if isinstance(value, OpOverload | OpOverloadPacket | HigherOrderOperator):
        return _function(value)
    raise UndeterminedGraphError(
        f"the graph holds a {type(value).__name__}, which has no description"
    )


def _tensor(value: Any) -> str:
    """A plain tensor without what it holds; another kind of tensor computes by code that the graph does not show."""
    if not isinstance(value, Tensor) or type(value) not in (Tensor, torch.nn.Parameter, FakeTensor):
        raise UndeterminedGraphError(
            f"the graph takes a {type(value).__name__}, not a plain tensor"
        )
    return (
        f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device} {value.requires_grad}"
    )


def _content(value: Tensor) -> str:
    content = value.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(content.numpy().tobytes()).hexdigest()
