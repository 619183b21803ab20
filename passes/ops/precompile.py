"""The Triton kernels of a graph's ops, compiled before anything runs: by a process that has no memory to run them in, and for
an artifact that shall hold them.

Inductor compiles its own kernels ahead. Those behind the ops of this package are compiled by Triton where they are first
launched, so each op is called here on tensors without memory, and every launch stops once the kernel is compiled.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves, tree_map_only

from passes.ops.library import KERNELS
from passes.torch_internals import JIT_RUN, LAUNCHER_CACHE

# By the name of its folder in Triton's cache, what a kernel's files hold.
KernelFiles = dict[str, dict[str, bytes]]

_SAVED_SUFFIXES = {".cubin", ".json", ".source", ".so"}


@dataclass(frozen=True, slots=True)
class _TensorSpec:
    """A tensor but for its memory, which is taken to begin at a multiple of 16 bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device

    def make(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class KernelCall:
    """A call of one of this package's ops, by its kernel."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def kernel_calls(graph: Graph) -> list[KernelCall]:
    """The calls of a graph for a GPU, those that differ in more than what their tensors hold."""
    calls: dict[str, KernelCall] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in KERNELS:
            args, kwargs = tree_map_only(Node, _tensor_spec, (node.args, node.kwargs))
            if all(
                value.device.type == "cuda"
                for value in tree_leaves((args, kwargs))
                if isinstance(value, _TensorSpec)
            ):
                calls.setdefault(
                    f"{node.target} {args} {kwargs}", KernelCall(KERNELS[node.target], args, kwargs)
                )
    return list(calls.values())


def compile_kernels(calls: list[KernelCall]) -> KernelFiles:
    """Compile what the calls launch, or find it in Triton's cache."""
    files: KernelFiles = {}
    if not calls:
        return files
    with compile_without_launching(files), FakeTensorMode():
        for call in calls:
            args, kwargs = tree_map_only(_TensorSpec, _TensorSpec.make, (call.args, call.kwargs))
            call.kernel(*args, **kwargs)
    return files


def restore_kernels(files: KernelFiles) -> None:
    """Put into Triton's cache what it lacks of them; raises OSError."""
    from triton.runtime.cache import get_cache_manager

    for folder, contents in files.items():
        manager = get_cache_manager(folder)
        paths = {
            name: manager.get_file(name) or manager.put(content, name)
            for name, content in contents.items()
        }
        for name in paths:
            if name.endswith(".json") and manager.get_group(name) is None:
                manager.put_group(name, paths)


def _tensor_spec(node: Node) -> _TensorSpec:
    value = node.meta["val"]
    return _TensorSpec(value.dtype, tuple(value.shape), value.stride(), value.device)


@contextmanager
def compile_without_launching(files: KernelFiles) -> Iterator[None]:
    """While this is open, this thread's launches compile the kernel and what launches it, and note the files of both."""
    from triton.runtime import driver
    from triton.runtime.cache import FileCacheManager, get_cache_manager
    from triton.runtime.jit import MockTensor

    run, folders, thread = JIT_RUN.get(), list[str](), threading.get_ident()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:  # another engine's launch
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)
        args, kwargs = tree_map_only(
            Tensor, lambda tensor: MockTensor(tensor.dtype, list(tensor.shape)), (args, kwargs)
        )
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        with LAUNCHER_CACHE.patch(noting):
            driver.active.launcher_cls(kernel.src, kernel.metadata)
        folders.append(kernel.hash)
        return kernel

    def noting(folder: str) -> Any:
        if threading.get_ident() == thread:
            folders.append(folder)
        return get_cache_manager(folder)

    with JIT_RUN.patch(compile_only):
        yield
    for folder in dict.fromkeys(folders):
        files[folder] = _read(Path(FileCacheManager(folder).cache_dir))


def _read(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in _SAVED_SUFFIXES and not path.name.startswith("__grp__")
    }
