"""torch's CUDA graph trees: recordings of this thread, their memory, and failed captures."""

import threading
import traceback
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from compiled_llm.errors import CaptureError
from compiled_llm.system.torch_patches import (
    COUNTERS,
    END_ALLOCATE_TO_POOL,
    GET_MANAGER,
    GRAPH_NODE,
    RELEASE_POOL,
    TREE_MANAGER,
    TREES_OF_THREAD,
)

# Importing the trees stores Python objects in the thread-local storage of the importing thread's
# C++ part. Such a thread releases them when it ends, and that aborts the process if the interpreter
# is exiting. So they are imported here, with the library, and not by an engine's own thread.
TREES_OF_THREAD.get()


def prepare_thread() -> None:
    """Enable graph trees in this thread.

    torch itself enables them in the thread that imports it and in autograd's threads only.
    """
    local = TREES_OF_THREAD.get()
    if not hasattr(local, "tree_manager_containers"):
        local.tree_manager_containers = {}
        local.tree_manager_locks = defaultdict(threading.Lock)


def _manager(device: torch.device) -> Any:
    """Return this thread's graph-tree manager, or None before its first recording."""
    if device.type != "cuda":
        return None
    TREE_MANAGER.get()
    return GET_MANAGER.get()(device.index, create_if_none_exists=False)


def current_recording(device: torch.device) -> Any:
    """Return the graph-tree node that was recorded last.

    Raises:
        CaptureError: nothing was recorded, or the recording copies inputs to fixed addresses.
    """
    manager = _manager(device)
    node = manager.current_node if manager is not None else None
    if not isinstance(node, GRAPH_NODE.get()):
        raise CaptureError(
            "expected the graph trees to have recorded a CUDA graph, "
            f"but their state is {type(node).__name__}"
        )
    if node.non_static_input_idx:
        raise CaptureError(
            "expected all inputs of the CUDA graph at fixed addresses, "
            f"but it copies {len(node.non_static_input_idx)} of them before each replay"
        )
    return node


def drop_recording(recording: Any, device: torch.device) -> None:
    """Drop a recording, so that others may use its memory; it must not be replayed again."""
    manager = _manager(device)
    if manager is None or recording is None:
        return
    if manager.current_node is recording:
        manager.clear_current_path_state_and_set_to_none()
    for recorded in manager.roots.values():
        recorded[:] = [node for node in recorded if node is not recording]


def graph_events(device: torch.device) -> dict[str, int]:
    """Return the counts, since the process began, of events that a plain replay does not cause."""
    manager, counters = _manager(device), COUNTERS.get()
    return {
        "graph skips": counters["inductor"]["cudagraph_skips"],
        "recompiles": counters["stats"]["unique_graphs"],
        # The counter includes the first recording of each step.
        "re-records": manager.debug_fail_counter if manager is not None else 0,
    }


def graph_bytes(device: torch.device) -> int:
    """Return the bytes that this thread's recordings take.

    These are the memory pool, and what the driver allocates outside torch's allocator, such as the
    graphs themselves.
    """
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device) + graph_pool(device)[1]


def graph_pool(device: torch.device) -> tuple[int, int]:
    """Return the number of this thread's CUDA graphs, and the bytes of their memory pool."""
    manager = _manager(device)
    if manager is None:
        return 0, 0
    nodes = [node for recorded in manager.roots.values() for node in recorded]
    pools = {tuple(node.cuda_graphs_pool) for node in nodes}
    pools.add(tuple(manager.cuda_graphs_thread_pool))
    segments = [
        segment
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) in pools
    ]
    return len(nodes), sum(segment["total_size"] for segment in segments)


@contextmanager
def recover_failed_capture(device: torch.device) -> Iterator[None]:
    """Restore the state of the graph trees when a capture in the body fails.

    Ending a failed capture raises, and torch then skips the steps that would follow: restoring the
    stream, ending the allocations into the pool in device and in pinned memory, and resetting the
    random generator. The allocations in pinned memory cannot be ended afterwards, so later
    recordings use a new pool; earlier ones keep the old pool.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    try:
        yield
    except BaseException as error:  # a KeyboardInterrupt can end a capture, too
        manager = _manager(device)
        if stream is not None and manager is not None:
            torch.cuda.set_stream(stream)
            _leave_failed_capture(device, manager, error)
        raise


# The allocator of pinned memory keeps a callback into the graph of a failed capture until the
# process ends, so that graph must not be freed.
_failed_graphs: list[torch.cuda.CUDAGraph] = []


def _leave_failed_capture(device: torch.device, manager: Any, error: BaseException) -> None:
    pool = manager.cuda_graphs_thread_pool
    try:
        END_ALLOCATE_TO_POOL.get()(device.index, pool)
    except RuntimeError:
        return  # the failure was outside a capture
    RELEASE_POOL.get()(device.index, pool)
    owners = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    _failed_graphs.extend(
        owner.cuda_graph for owner in owners if isinstance(owner, torch.cuda.graph)
    )
    manager.graph = torch.cuda.CUDAGraph()
    manager.cuda_graphs_thread_pool = torch.cuda.graph_pool_handle()
    # The random generator leaves its capturing state at the end of the next successful capture.
    capture = torch.cuda.graph(
        manager.graph,
        pool=manager.cuda_graphs_thread_pool,
        stream=manager.stream,
        capture_error_mode="thread_local",
    )
    with capture:
        torch.zeros(1, device=device)
