"""Precompilation: the calls that are collected from a graph, and files in Triton's cache."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from passes.ops.precompile import compile_kernels, kernel_calls, restore_kernels
from passes.ops.skinny_linear import skinny_linear, skinny_linear_kernel


def make_call(graph: Graph, num_tokens: int, device: str) -> Node:
    """Insert a call of an op whose arguments are new graph inputs."""
    number = len(graph.nodes)
    x, weight = graph.placeholder(f"x_{number}"), graph.placeholder(f"weight_{number}")
    with FakeTensorMode():
        x.meta["val"] = torch.empty(num_tokens, 64, dtype=torch.bfloat16, device=device)
        weight.meta["val"] = torch.empty(32, 64, dtype=torch.bfloat16, device=device)
    return graph.call_function(skinny_linear, (x, weight, None, 0.0, None, False))


def test_calls_that_differ_in_metadata_are_collected_once() -> None:
    graph = Graph()
    for num_tokens in (1, 1, 4):
        make_call(graph, num_tokens, "cuda")
    calls = kernel_calls(graph)
    assert [call.kernel for call in calls] == [skinny_linear_kernel, skinny_linear_kernel]
    assert [call.args[0].shape for call in calls] == [(1, 64), (4, 64)]
    x = calls[0].args[0]
    assert (x.dtype, x.stride, x.device.type) == (torch.bfloat16, (64, 1), "cuda")
    assert calls[0].args[2:] == (None, 0.0, None, False)


def test_calls_on_a_cpu_are_not_collected() -> None:
    graph = Graph()
    make_call(graph, 1, "cpu")
    assert kernel_calls(graph) == []
    assert compile_kernels([]) == {}


def test_restored_files_are_found_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.cache import get_cache_manager

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    files = {"A" * 52: {"kernel.json": b"{}", "kernel.cubin": b"binary"}}
    restore_kernels(files)
    restore_kernels(files)  # files that exist are left as they are
    manager = get_cache_manager("A" * 52)
    group = manager.get_group("kernel.json")
    assert group is not None
    assert {name: Path(path).read_bytes() for name, path in group.items()} == files["A" * 52]
