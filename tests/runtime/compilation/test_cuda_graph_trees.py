"""CUDA graph trees: threads, recordings and their counts, on a machine with or without a GPU."""

import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import cudagraph_trees
from torch._inductor.cudagraph_trees import CUDAGraphNode, get_manager

from compiled_llm.errors import CaptureError
from compiled_llm.runtime.compilation import cuda_graph_trees
from compiled_llm.runtime.compilation.cuda_graph_trees import (
    current_recording,
    drop_recording,
    graph_bytes,
    graph_events,
    graph_pool,
    prepare_thread,
    recover_failed_capture,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Node(CUDAGraphNode):
    """A recording without a graph."""

    def __init__(self, num_copied: int = 0, pool: tuple[int, int] = (0, 1)) -> None:
        self.non_static_input_idx = list(range(num_copied))
        self.cuda_graphs_pool = pool


class Manager:
    """The parts of torch's graph-tree manager that the module uses."""

    def __init__(self, current: object, roots: list[Node]) -> None:
        self.current_node: Any = current
        self.roots = {0: roots}
        self.cuda_graphs_thread_pool = (0, 1)
        self.debug_fail_counter = 5

    def clear_current_path_state_and_set_to_none(self) -> None:
        self.current_node = None


@pytest.fixture
def use_manager(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes a manager that of the GPU in this thread."""

    def use(manager: Manager | None) -> None:
        def manager_of(device_index: int, create_if_none_exists: bool = True) -> Any:
            assert not create_if_none_exists
            return manager

        monkeypatch.setattr(cudagraph_trees, "get_manager", manager_of)

    cuda_graph_trees.GET_MANAGER.get()  # checked before it is replaced
    return use


def test_a_new_thread_can_have_graph_trees() -> None:
    """Without `prepare_thread`, torch fails an assertion in a new thread."""
    found: list[object] = []

    def look() -> None:
        try:
            get_manager(0, create_if_none_exists=False)
        except AssertionError as error:
            found.append(error)
        prepare_thread()
        found.append(get_manager(0, create_if_none_exists=False))
        containers = cudagraph_trees.local.tree_manager_containers
        prepare_thread()
        found.append(cudagraph_trees.local.tree_manager_containers is containers)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert isinstance(found[0], AssertionError)
    assert found[1:] == [None, True], "a second call changes nothing"


def test_the_library_imports_the_trees_in_the_thread_that_imports_it() -> None:
    """A thread that imports them instead may abort the process when it ends at exit."""
    code = "from compiled_llm import AsyncCompiledLLM; import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert "torch._inductor.cudagraph_trees" in done.stdout.split()


def test_a_cpu_has_no_graphs() -> None:
    assert graph_pool(CPU) == (0, 0)
    assert graph_bytes(CPU) == 0
    drop_recording(None, CPU)
    with pytest.raises(CaptureError, match="but their state is NoneType"):
        current_recording(CPU)


def test_events_are_those_of_torchs_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(counters["inductor"], "cudagraph_skips", 3)
    monkeypatch.setitem(counters["stats"], "unique_graphs", 4)
    assert graph_events(CPU) == {"graph skips": 3, "recompiles": 4, "re-records": 0}


def test_re_records_are_those_of_the_manager(use_manager: Any) -> None:
    use_manager(None)
    assert graph_events(GPU)["re-records"] == 0
    use_manager(Manager(None, []))
    assert graph_events(GPU)["re-records"] == 5


def test_the_current_recording_is_found_or_refused(use_manager: Any) -> None:
    node = Node()
    use_manager(Manager(node, [node]))
    assert current_recording(GPU) is node
    use_manager(Manager(SimpleNamespace(), []))
    with pytest.raises(CaptureError, match="but their state is SimpleNamespace"):
        current_recording(GPU)
    use_manager(Manager(Node(num_copied=2), []))
    with pytest.raises(CaptureError, match="it copies 2 of them before each replay"):
        current_recording(GPU)


def test_a_dropped_recording_is_in_no_tree(use_manager: Any) -> None:
    first, last = Node(), Node()
    manager = Manager(last, [first, last])
    use_manager(manager)
    drop_recording(first, GPU)
    assert (manager.roots, manager.current_node) == ({0: [last]}, last)
    drop_recording(last, GPU)
    assert (manager.roots, manager.current_node) == ({0: []}, None)


def test_the_pool_is_that_of_all_recordings(
    use_manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = [
        {"segment_pool_id": pool, "total_size": size}
        for pool, size in [((0, 1), 1), ((0, 2), 10), ((0, 3), 100)]
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    use_manager(Manager(None, [Node(pool=(0, 1)), Node(pool=(0, 2))]))
    assert graph_pool(GPU) == (2, 11)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 600)
    assert graph_bytes(GPU) == 111, "100 bytes outside torch's allocator"


def test_an_error_passes_through_the_recovery() -> None:
    with pytest.raises(KeyboardInterrupt), recover_failed_capture(CPU):
        raise KeyboardInterrupt
