"""A digest of the graph that Dynamo traces, by which a compiled step is matched with a model.

Equal digests mean equal graphs: the same ops with the same constants, on tensors at the same places
in the module with the same shapes, strides and dtypes. The contents of tensors are not compiled in
and do not count, except for constants of the graph itself. Any change to what a model computes (a
hook, a patched method, an attribute, another activation) changes the graph.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from compiled_llm.system.torch_patches import FULLGRAPH_CAPTURE

# An artifact's key holds the versions, or the source, of these.
_OPAQUE_NAMESPACES = {"aten", "prims", "prim", "compiled_llm"}
_LIBRARY_MODULES = ("torch", "_operator", "operator", "math", "builtins")
_SCALARS = (type(None), bool, int, float, complex, str, bytes, type(...))
_TORCH_VALUES = (torch.dtype, torch.device, torch.layout, torch.memory_format)


class UndeterminedGraphError(ValueError):
    """The graph calls code that it does not contain, so equal graphs may compute other values."""


class _TracedError(Exception):
    """Ends a compilation after its tracing."""


def digest_of(module: GraphModule) -> str:
    """Return the SHA-256 of a graph, in hexadecimal digits. Raises UndeterminedGraphError."""
    digest, numbers = hashlib.sha256(), dict[Node, int]()
    try:
        for node in module.graph.nodes:
            arguments = _describe(node.args, numbers), _describe(node.kwargs, numbers)
            line = (node.op, _target(node, module), *arguments)
            digest.update(f"{line}\n".encode())
            numbers[node] = len(numbers)
    except (AttributeError, RuntimeError, TypeError) as error:
        # A function without a name, or a tensor without strides.
        raise UndeterminedGraphError(
            f"the graph holds an object that cannot be described: {error}"
        ) from error
    return digest.hexdigest()


def trace(compile_step: Callable[[], object]) -> str:
    """Return the digest of the graph that a call would compile; the call ends after tracing.

    Raises:
        UndeterminedGraphError: the graph calls code that it does not contain.
        Exception: whatever tracing raises.
    """

    def stop(module: GraphModule) -> None:
        modules.append(module)
        raise _TracedError

    modules: list[GraphModule] = []
    with _on_each_graph(stop), suppress(_TracedError):
        compile_step()
    return digest_of(modules[-1])


@contextmanager
def record_digests() -> Iterator[list[str]]:
    """Yield a list that gets the digest of each graph traced in the body; "" if undetermined."""

    def record(module: GraphModule) -> None:
        try:
            digests.append(digest_of(module))
        except UndeterminedGraphError:
            digests.append("")

    digests: list[str] = []
    with _on_each_graph(record):
        yield digests


@contextmanager
def _on_each_graph(callback: Callable[[GraphModule], None]) -> Iterator[None]:
    capture = FULLGRAPH_CAPTURE.get()

    def capture_and_call(*args: Any, **kwargs: Any) -> Any:
        captured = capture(*args, **kwargs)
        assert captured.backend_input is not None
        callback(captured.backend_input.graph_module)
        return captured

    with FULLGRAPH_CAPTURE.patch(capture_and_call):
        yield


def _target(node: Node, module: GraphModule) -> str:
    if node.op == "placeholder":
        return f"{node.target} {_tensor(node.meta.get('example_value'))}"
    if node.op == "get_attr":
        value: Any = module
        for name in str(node.target).split("."):
            value = getattr(value, name)
        if isinstance(value, GraphModule):
            return digest_of(value)
        return f"{_tensor(value)} {_content(value)}"
    if node.op == "call_function":
        return _function(node.target)
    if node.op == "call_module":
        raise UndeterminedGraphError(f"the graph calls the module {node.target}")
    return str(node.target)


def _function(function: Any) -> str:
    """Return the name of a function of torch or Python.

    With the versions of both, the name determines what the function computes.
    """
    if isinstance(function, OpOverloadPacket):
        return ",".join(_function(getattr(function, overload)) for overload in function.overloads())
    if isinstance(function, OpOverload):
        return _overload(function)
    if isinstance(function, HigherOrderOperator):
        if "triton_kernel" in str(function.name()):
            raise UndeterminedGraphError(
                f"the graph calls a Triton kernel of the model ({function.name()})"
            )
        return str(function.name())
    owner = getattr(function, "__objclass__", None)
    module = str(getattr(function, "__module__", None) or getattr(owner, "__module__", None))
    if module.partition(".")[0] not in _LIBRARY_MODULES:
        name = f"{module}.{getattr(function, '__name__', function)}"
        raise UndeterminedGraphError(f"the graph calls {name}, whose code it does not contain")
    return f"{module}.{getattr(owner, '__name__', '')}.{function.__name__}"


def _overload(function: OpOverload) -> str:
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(
        function.name(), "CompositeImplicitAutograd"
    )
    if composite and function.namespace not in _OPAQUE_NAMESPACES:
        raise UndeterminedGraphError(
            f"the graph calls {function}, which is compiled from code of its own"
        )
    return str(function.name())


def _describe(value: Any, numbers: dict[Node, int]) -> str:
    """Describe an argument by a text that is equal in every process."""
    if isinstance(value, Node):
        return f"%{numbers[value]}"
    if type(value) in _SCALARS or isinstance(value, _TORCH_VALUES):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}[{', '.join(_describe(part, numbers) for part in value)}]"
    if isinstance(value, dict):
        parts = (f"{name!r}: {_describe(part, numbers)}" for name, part in value.items())
        return f"dict[{', '.join(parts)}]"
    if isinstance(value, OpOverload | OpOverloadPacket | HigherOrderOperator):
        return _function(value)
    raise UndeterminedGraphError(
        f"the graph holds a {type(value).__name__}, which cannot be described"
    )


def _tensor(value: Any) -> str:
    """Describe a plain tensor without its contents.

    A tensor subclass computes with code that the graph does not contain.
    """
    if not isinstance(value, Tensor) or type(value) not in (Tensor, torch.nn.Parameter, FakeTensor):
        raise UndeterminedGraphError(
            f"the graph takes a {type(value).__name__}, not a plain tensor"
        )
    shape = f"{tuple(value.shape)} {value.stride()}"
    return f"{value.dtype} {shape} {value.device} {value.requires_grad}"


def _content(value: Tensor) -> str:
    content = value.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(content.numpy().tobytes()).hexdigest()
