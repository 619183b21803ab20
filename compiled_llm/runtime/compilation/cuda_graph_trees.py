"""torch's CUDA graph trees: what they hold of this thread, whose they are, and how a failed capture leaves them."""

import threading
import traceback
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._inductor import cudagraph_trees

from compiled_llm.errors import CaptureError


def prepare_thread() -> None:
    """Let this thread have graph trees: torch gives them to the thread that imports it and to autograd's, and to no other."""
    local = cudagraph_trees.local
    if not hasattr(local, "tree_manager_containers"):
        local.tree_manager_containers = {}
        local.tree_manager_locks = defaultdict(threading.Lock)


def _manager(device: torch.device) -> Any:
    """The graph-tree manager of this thread, or None before anything was recorded."""
    return (
        cudagraph_trees.get_manager(device.index, create_if_none_exists=False)
        if device.type == "cuda"
        else None
    )


def current_recording(device: torch.device) -> Any:
    """The graph-tree node of the step that was just recorded."""
    manager = _manager(device)
    node = manager.current_node if manager is not None else None
    if not isinstance(node, cudagraph_trees.CUDAGraphNode):
        raise CaptureError(
            f"the graph trees recorded nothing (their state is {type(node).__name__})"
        )
    if node.non_static_input_idx:
        raise CaptureError(
            f"the recording copies {len(node.non_static_input_idx)} inputs: not all of them are at fixed addresses"
        )
    return node


def drop_recording(recording: Any, device: torch.device) -> None:
    """Let go of a recording, which must not be launched again; the memory that it worked in is for others to work in."""
    manager = _manager(device)
    if manager is None or recording is None:
        return
    if manager.current_node is recording:
        manager.clear_current_path_state_and_set_to_none()
    for recorded in manager.roots.values():
        recorded[:] = [node for node in recorded if node is not recording]


def graph_events(device: torch.device) -> dict[str, int]:
    """Counts since the process began; a step that makes one grow was not a mere replay."""
    manager = _manager(device)
    return {
        "graph skips": counters["inductor"]["cudagraph_skips"],
        "recompiles": counters["stats"]["unique_graphs"],
        "re-records": manager.debug_fail_counter
        if manager is not None
        else 0,  # counts every recording
    }


def graph_bytes(device: torch.device) -> int:
    """What recordings of this thread take: the pool, and what the driver holds beside torch's own memory, such as the graphs."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device) + graph_pool(device)[1]


def graph_pool(device: torch.device) -> tuple[int, int]:
    """How many CUDA graphs this thread holds, and the bytes of the memory that they work in."""
    manager = _manager(device)
    if manager is None:
        return 0, 0
    nodes = [node for recorded in manager.roots.values() for node in recorded]
    pools = {
        tuple(manager.cuda_graphs_thread_pool),
        *(tuple(node.cuda_graphs_pool) for node in nodes),
    }
    segments = [
        segment
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) in pools
    ]
    return len(nodes), sum(segment["total_size"] for segment in segments)


@contextmanager
def recover_failed_capture(device: torch.device) -> Iterator[None]:
    """Make a failed capture cost its own bucket alone.

    Ending a capture that failed raises, and torch then leaves undone what would have followed: to go back to the stream, to end
    the allocations into the pool, on the device and in pinned memory, and to tell the random generator. The end in pinned memory
    cannot be made up for, so the trees go on in a pool of their own; what was recorded before keeps the old one.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    try:
        yield
    except BaseException as error:  # an interrupt, too, may end a capture
        manager = _manager(device)
        if stream is not None and manager is not None:
            torch.cuda.set_stream(stream)
            _leave_failed_capture(device, manager, error)
        raise


# The allocator of pinned memory calls back, as long as the process lives, into a graph whose capture failed.
_failed_graphs: list[torch.cuda.CUDAGraph] = []


def _leave_failed_capture(device: torch.device, manager: Any, error: BaseException) -> None:
    pool = manager.cuda_graphs_thread_pool
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
    except RuntimeError:
        return  # the failure was not inside a capture
    torch._C._cuda_releasePool(device.index, pool)
    owners = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    _failed_graphs.extend(
        owner.cuda_graph for owner in owners if isinstance(owner, torch.cuda.graph)
    )
    # The generator leaves its capturing state with the next capture that ends well.
    manager.graph, manager.cuda_graphs_thread_pool = (
        torch.cuda.CUDAGraph(),
        torch.cuda.graph_pool_handle(),
    )
    capture = torch.cuda.graph(
        manager.graph,
        pool=manager.cuda_graphs_thread_pool,
        stream=manager.stream,
        capture_error_mode="thread_local",
    )
    with capture:
        torch.zeros(1, device=device)
