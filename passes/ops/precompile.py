"""Compile the Triton kernels of a graph's ops before anything runs.

Inductor compiles its own kernels together with the graph, but Triton compiles those of this
package's ops at their first launch. To compile them in a process without GPU memory, or to save
them in an artifact, each op of the graph is called on fake tensors while launches are replaced by
compilations.
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

# Contents of a kernel's files, by file name, by the name of its folder in Triton's cache.
KernelFiles = dict[str, dict[str, bytes]]

_SAVED_SUFFIXES = {".cubin", ".json", ".source", ".so"}


@dataclass(frozen=True, slots=True)
class _TensorSpec:
    """The metadata of a tensor, whose memory is assumed to be aligned to 16 bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device

    def make(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class KernelCall:
    """A call of one of this package's ops; tensors are replaced by their metadata.

    Attributes:
        kernel: CUDA implementation of the op.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def kernel_calls(graph: Graph) -> list[KernelCall]:
    """Return the calls of this package's ops on CUDA tensors, without duplicates."""
    calls: dict[str, KernelCall] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in KERNELS:
            args, kwargs = tree_map_only(Node, _tensor_spec, (node.args, node.kwargs))
            specs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _TensorSpec)]
            if all(spec.device.type == "cuda" for spec in specs):
                call = KernelCall(KERNELS[node.target], args, kwargs)
                calls.setdefault(f"{node.target} {args} {kwargs}", call)
    return list(calls.values())


def _tensor_spec(node: Node) -> _TensorSpec:
    value = node.meta["val"]
    return _TensorSpec(value.dtype, tuple(value.shape), value.stride(), value.device)


def compile_kernels(calls: list[KernelCall]) -> KernelFiles:
    """Compile the kernels that the calls launch, or find them in Triton's cache."""
    files: KernelFiles = {}
    if not calls:
        return files
    with compile_without_launching(files), FakeTensorMode():
        for call in calls:
            args, kwargs = tree_map_only(_TensorSpec, _TensorSpec.make, (call.args, call.kwargs))
            call.kernel(*args, **kwargs)
    return files


def restore_kernels(files: KernelFiles) -> None:
    """Add kernels to Triton's cache that it does not hold.

    Raises:
        OSError: the cache is not writable.
    """
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


@contextmanager
def compile_without_launching(files: KernelFiles) -> Iterator[None]:
    """Replace this thread's Triton launches by compilations; on exit, add their files to `files`.

    The launcher of each kernel, a C extension, is compiled as well.
    """
    from triton.runtime import driver
    from triton.runtime.cache import FileCacheManager, get_cache_manager
    from triton.runtime.jit import MockTensor

    run = JIT_RUN.get()
    folders = list[str]()
    thread = threading.get_ident()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:  # another thread, which may run an engine
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)
        args, kwargs = tree_map_only(
            Tensor, lambda tensor: MockTensor(tensor.dtype, list(tensor.shape)), (args, kwargs)
        )
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        with LAUNCHER_CACHE.patch(record_folder):
            driver.active.launcher_cls(kernel.src, kernel.metadata)
        folders.append(kernel.hash)
        return kernel

    def record_folder(folder: str) -> Any:
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
