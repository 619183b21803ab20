"""How a step is compiled and launched: one small protocol, two ways.

`direct` takes torch.compile(mode="reduce-overhead") apart so that each part can be kept: the step is compiled ahead of time
without guards, the CUDA graph trees record it during two warm calls, and the recording that the tree holds is replayed from
then on, which costs the host a few microseconds. `torch` is the mode itself, guards and tree checks included.
"""

import difflib
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch._dynamo.config as dynamo_config
import torch._inductor.config as inductor_config
import torch.compiler.config as compiler_config
from torch._dynamo.aot_compile import AOTCompiledFunction
from torch._dynamo.utils import counters
from torch._inductor import cudagraph_trees

from compiled_llm.runtime import vector_units
from compiled_llm.runtime.compile_clock import Durations, Moment, durations
from compiled_llm.runtime.step import Step
from passes import Pipeline
from passes.early_launch import inductor_options, inductor_waits

Launch = Callable[[], object]

# Two buckets of one engine never share an entry's guards, so the limit that protects against endless recompiles only hurts.
_DYNAMO = {"enable_aot_compile": True, "recompile_limit": 4096, "accumulated_recompile_limit": 4096}
_INDUCTOR = {
    # One graph or an error: a partitioned graph would be several launches.
    "graph_partition": False,
    "triton.cudagraph_or_error": True,
    # Indices are checked on the host, once a request.
    "assert_indirect_indexing": False,
    # Left to itself, Inductor times a product with its sizes padded, and so makes another graph of it now and then.
    "shape_padding": False,
}


if not torch.cuda.is_available():
    # Without a GPU, the first thread that traces puts up a guard of its own for CUDA devices, which dies with it, while every
    # other thread that traces goes on to use it: a crash. So it shall be the thread that imports this, most likely the main one.
    torch._C._ensureCUDADeviceGuardSet()


class CaptureError(RuntimeError):
    """A compiled step was not recorded as one CUDA graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledStep:
    """A step ready to launch.

    Attributes:
        launch: runs the step once.
        graph: whether `launch` replays a recording and nothing else.
        recording: the graph-tree node that `launch` replays, if it does.
        owner: what must live as long as `launch` is called: when the last compiled function dies, so do the graph trees, and
            with them the memory that their recordings work in.
        seconds: what it took; where the step was saved before, compiling is reading it.
    """

    launch: Launch
    graph: bool
    recording: object
    owner: object
    seconds: Durations


class Dispatch(Protocol):
    """Compiles a step with the passes and Inductor options given, or takes what was saved of it, and captures it.

    Any failure raises.
    """

    def __call__(self, step: Step, pipeline: Pipeline, options: dict[str, Any], saved: bytes | None = None) -> CompiledStep: ...


def prepare_thread() -> None:
    """Let this thread have graph trees: torch gives them to the thread that imports it and to autograd's, and to no other."""
    local = cudagraph_trees.local
    if not hasattr(local, "tree_manager_containers"):
        local.tree_manager_containers = {}
        local.tree_manager_locks = defaultdict(threading.Lock)


def direct(step: Step, pipeline: Pipeline, options: dict[str, Any], saved: bytes | None = None) -> CompiledStep:
    """Compile ahead of time, record through the graph trees, replay the recording."""
    device = step.state.tokens.device
    began = Moment.now()
    with _settings(device, pipeline, options):
        compiled = _compile_ahead(step) if saved is None else AOTCompiledFunction.deserialize(saved, {})
        compiled.disable_guard_check()
        compiled_at = Moment.now()
        for _ in range(2):
            torch.compiler.cudagraph_mark_step_begin()
            compiled(step)
    recording = _recording(device) if device.type == "cuda" else None
    return CompiledStep(
        launch=recording.graph.replay if recording is not None else lambda: compiled(step),
        graph=recording is not None,
        recording=recording,
        owner=compiled,
        seconds=durations(began, compiled_at, Moment.now()),
    )


def compile_only(step: Step, pipeline: Pipeline, options: dict[str, Any]) -> bytes:
    """What `direct` takes as `saved`; nothing of the step runs, so its tensors need no memory."""
    with _settings(step.state.tokens.device, pipeline, options):
        return AOTCompiledFunction.serialize(_compile_ahead(step)).serialized_data


def serialize(compiled: CompiledStep) -> bytes:
    """Of what `direct` compiled: what it takes as `saved` in another process."""
    assert isinstance(compiled.owner, AOTCompiledFunction)
    return AOTCompiledFunction.serialize(compiled.owner).serialized_data


def _compile_ahead(step: Step) -> AOTCompiledFunction:
    jitted: Any = torch.compile(
        step.forward, fullgraph=True, dynamic=False, options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    )
    compiled: AOTCompiledFunction = jitted.aot_compile(((), {}))
    return compiled


def via_torch(step: Step, pipeline: Pipeline, options: dict[str, Any], saved: bytes | None = None) -> CompiledStep:
    """torch.compile(mode="reduce-overhead"), called as anyone would call it; it keeps nothing."""
    device = step.state.tokens.device
    began = Moment.now()
    with _settings(device, pipeline, options):
        compiled = torch.compile(step.forward, fullgraph=True, dynamic=False, mode="reduce-overhead")
        compiled()
        compiled_at = Moment.now()
        compiled()
    return CompiledStep(
        launch=compiled,
        graph=False,
        recording=None,
        owner=compiled,
        seconds=durations(began, compiled_at, Moment.now()),
    )


DISPATCHES: dict[str, Dispatch] = {"direct": direct, "torch": via_torch}


@contextmanager
def _settings(device: torch.device, pipeline: Pipeline, options: dict[str, Any]) -> Iterator[None]:
    """The compiler's settings for the length of one compile and capture; a user's own compiles keep theirs.

    The cudagraph option stands here and not in `options=`, because loading a cached graph reads the global one
    (pytorch#155703).
    """
    inductor = {**_INDUCTOR, "post_grad_custom_pre_pass": pipeline}
    if device.type == "cuda":
        # Kernels that need nothing of each other, such as those of queries and keys, as one launch.
        inductor |= {"triton.cudagraphs": True, "combo_kernels": True, **inductor_options(pipeline.context.num_tokens)}
    with ExitStack() as settings:
        settings.enter_context(dynamo_config.patch(_DYNAMO))
        settings.enter_context(inductor_config.patch(inductor | options))
        settings.enter_context(inductor_waits() if device.type == "cuda" else vector_units.remembered())
        settings.enter_context(vector_units.sums_stay_in_bounds())
        tag = f"{compiler_config.cache_key_tag}{vector_units.TAG}"
        settings.enter_context(compiler_config.patch(cache_key_tag=tag))  # type: ignore[attr-defined]  # torch adds it
        settings.enter_context(_recovery(device))
        yield


@contextmanager
def _recovery(device: torch.device) -> Iterator[None]:
    """Make a failed capture cost its own bucket alone.

    Ending a capture that failed raises, and torch then leaves undone what would have followed: to go back to the stream, to end
    the allocations into the pool, on the device and in pinned memory, and to tell the random generator. The end in pinned memory
    cannot be made up for, so the trees go on in a pool of their own; what was recorded before keeps the old one.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    try:
        yield
    except Exception as error:
        manager = _manager(device)
        if stream is not None and manager is not None:
            torch.cuda.set_stream(stream)
            _leave_failed_capture(device, manager, error)
        raise


# The allocator of pinned memory calls back, as long as the process lives, into a graph whose capture failed.
_failed_graphs: list[torch.cuda.CUDAGraph] = []


def _leave_failed_capture(device: torch.device, manager: Any, error: Exception) -> None:
    pool = manager.cuda_graphs_thread_pool
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
    except RuntimeError:
        return  # the failure was not inside a capture
    torch._C._cuda_releasePool(device.index, pool)
    owners = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    _failed_graphs.extend(owner.cuda_graph for owner in owners if isinstance(owner, torch.cuda.graph))
    # The generator leaves its capturing state with the next capture that ends well.
    manager.graph, manager.cuda_graphs_thread_pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    capture = torch.cuda.graph(
        manager.graph, pool=manager.cuda_graphs_thread_pool, stream=manager.stream, capture_error_mode="thread_local"
    )
    with capture:
        torch.zeros(1, device=device)


def _manager(device: torch.device) -> Any:
    """The graph-tree manager of this thread, or None before anything was recorded."""
    return cudagraph_trees.get_manager(device.index, create_if_none_exists=False) if device.type == "cuda" else None


def _recording(device: torch.device) -> Any:
    """The graph-tree node of the step that was just recorded."""
    manager = _manager(device)
    node = manager.current_node if manager is not None else None
    if not isinstance(node, cudagraph_trees.CUDAGraphNode):
        raise CaptureError(f"the graph trees recorded nothing (their state is {type(node).__name__})")
    if node.non_static_input_idx:
        raise CaptureError(f"the recording copies {len(node.non_static_input_idx)} inputs: not all of them are at fixed addresses")
    return node


def check_options(options: dict[str, Any]) -> None:
    """Refuse what Inductor does not know; raises ValueError."""
    known = torch._inductor.list_options()
    for name in options:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"compile.options: Inductor has no option {name!r}{hint}")


def graph_events(device: torch.device) -> dict[str, int]:
    """Counts since the process began; a step that makes one grow was not a mere replay."""
    manager = _manager(device)
    return {
        "graph skips": counters["inductor"]["cudagraph_skips"],
        "recompiles": counters["stats"]["unique_graphs"],
        "re-records": manager.debug_fail_counter if manager is not None else 0,  # counts every recording
    }


def release(compiled: CompiledStep, device: torch.device) -> None:
    """Let go of a recording, which must not be launched again; the memory that it worked in is for others to work in."""
    manager = _manager(device)
    if manager is None or compiled.recording is None:
        return
    if manager.current_node is compiled.recording:
        manager.clear_current_path_state_and_set_to_none()
    for recorded in manager.roots.values():
        recorded[:] = [node for node in recorded if node is not compiled.recording]


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
    pools = {tuple(manager.cuda_graphs_thread_pool), *(tuple(node.cuda_graphs_pool) for node in nodes)}
    segments = [segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) in pools]
    return len(nodes), sum(segment["total_size"] for segment in segments)
