"""How a step is compiled and launched: one small protocol, two ways.

`direct` takes torch.compile(mode="reduce-overhead") apart so that each part can be kept: the step is compiled ahead of time
without guards, the CUDA graph trees record it during two warm calls, and the recording that the tree holds is replayed from
then on, which costs the host a few microseconds. `torch` is the mode itself, guards and tree checks included.
"""

import difflib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch._dynamo.config as dynamo_config
import torch._inductor.config as inductor_config
import torch.compiler.config as compiler_config
from torch._dynamo.aot_compile import AOTCompiledFunction

from compiled_llm.runtime.compilation import graph_digest, inductor_patches
from compiled_llm.runtime.compilation.cuda_graph_trees import (
    current_recording,
    drop_recording,
    recover_failed_capture,
)
from compiled_llm.runtime.compilation.fx_patches import thread_local_fx_patches
from compiled_llm.runtime.compilation.timing import Durations, Timestamp, durations
from compiled_llm.runtime.step.step import Step
from compiled_llm.system.compiler_lock import COMPILER_LOCK
from passes import Pipeline
from passes.ops.pdl import inductor_pdl_options, inductor_pdl_waits

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


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledStep:
    """A step ready to launch.

    Attributes:
        launch: runs the step once.
        graph: whether `launch` replays a recording and nothing else.
        guarded: whether `launch` checks guards, and may compile or record again.
        recording: the graph-tree node that `launch` replays, if it does.
        owner: what must live as long as `launch` is called: when the last compiled function dies, so do the graph trees, and
            with them the memory that their recordings work in.
        seconds: what it took; where the step was saved before, compiling is reading it.
        graph_digest: of the graph that it was compiled from; "" where that is not known.
    """

    launch: Launch
    graph: bool
    guarded: bool = False
    recording: object
    owner: object
    seconds: Durations
    graph_digest: str = ""


class Dispatch(Protocol):
    """Compiles a step with the passes and Inductor options given, or takes what was saved of it, and captures it.

    Any failure raises.
    """

    def __call__(
        self, step: Step, pipeline: Pipeline, options: dict[str, Any], saved: bytes | None = None
    ) -> CompiledStep: ...


def direct(
    step: Step, pipeline: Pipeline, options: dict[str, Any], saved: bytes | None = None
) -> CompiledStep:
    """Compile ahead of time, record through the graph trees, replay the recording."""
    device = step.state.tokens.device
    began = Timestamp.now()
    with _settings(device, pipeline, options):
        compiled, digest = (
            _compile_ahead(step)
            if saved is None
            else (AOTCompiledFunction.deserialize(saved, {}), "")
        )
        compiled.disable_guard_check()
        compiled_at = Timestamp.now()
        for _ in range(2):
            torch.compiler.cudagraph_mark_step_begin()
            compiled(step)
    recording = current_recording(device) if device.type == "cuda" else None
    return CompiledStep(
        launch=recording.graph.replay if recording is not None else lambda: compiled(step),
        graph=recording is not None,
        recording=recording,
        owner=compiled,
        seconds=durations(began, compiled_at, Timestamp.now()),
        graph_digest=digest,
    )


def compile_only(step: Step, pipeline: Pipeline, options: dict[str, Any]) -> tuple[bytes, str]:
    """What `direct` takes as `saved`, and the digest of its graph; nothing of the step runs, so its tensors need no memory."""
    with _settings(step.state.tokens.device, pipeline, options):
        compiled, digest = _compile_ahead(step)
        return AOTCompiledFunction.serialize(compiled).serialized_data, digest


@torch.no_grad()
def trace_digest(step: Step) -> str:
    """Digest of the graph that `direct` would compile of a step; raises what `graph_digest.trace` raises."""
    with COMPILER_LOCK, thread_local_fx_patches(), dynamo_config.patch(_DYNAMO):
        return graph_digest.trace(lambda: _ahead(step))


def serialize(compiled: CompiledStep) -> bytes:
    """Of what `direct` compiled: what it takes as `saved` in another process."""
    assert isinstance(compiled.owner, AOTCompiledFunction)
    return AOTCompiledFunction.serialize(compiled.owner).serialized_data


def _compile_ahead(step: Step) -> tuple[AOTCompiledFunction, str]:
    """The step, compiled, and the digest of its graph."""
    with graph_digest.record_digests() as digests:
        return _ahead(step), digests[-1]


def _ahead(step: Step) -> AOTCompiledFunction:
    jitted: Any = torch.compile(
        step.forward,
        fullgraph=True,
        dynamic=False,
        options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
    )
    compiled: AOTCompiledFunction = jitted.aot_compile(((), {}))
    return compiled


def via_torch(
    step: Step, pipeline: Pipeline, options: dict[str, Any], saved: bytes | None = None
) -> CompiledStep:
    """torch.compile(mode="reduce-overhead"), called as anyone would call it; it keeps nothing."""
    device = step.state.tokens.device
    began = Timestamp.now()
    compiled = torch.compile(step.forward, fullgraph=True, dynamic=False, mode="reduce-overhead")

    def launch() -> None:
        with COMPILER_LOCK:  # guards read what another engine's start changes
            torch.compiler.cudagraph_mark_step_begin()  # once one engine marks its steps, torch counts no step by itself
            compiled()

    with _settings(device, pipeline, options):
        launch()
        compiled_at = Timestamp.now()
        launch()
    return CompiledStep(
        launch=launch,
        graph=False,
        guarded=True,
        recording=None,
        owner=compiled,
        seconds=durations(began, compiled_at, Timestamp.now()),
    )


DISPATCHES: dict[str, Dispatch] = {"direct": direct, "torch": via_torch}


@contextmanager
def _settings(device: torch.device, pipeline: Pipeline, options: dict[str, Any]) -> Iterator[None]:
    """The compiler's settings for the length of one compile and capture, of one engine at a time; a user's own compiles after it
    keep theirs.

    The cudagraph option stands here and not in `options=`, because loading a cached graph reads the global one
    (pytorch#155703).
    """
    inductor = {**_INDUCTOR, "post_grad_custom_pre_pass": pipeline}
    if device.type == "cuda":
        # Kernels that need nothing of each other, such as those of queries and keys, as one launch.
        inductor |= {
            "triton.cudagraphs": True,
            "combo_kernels": True,
            **inductor_pdl_options(pipeline.context.num_tokens),
        }
    with COMPILER_LOCK, ExitStack() as settings:
        settings.enter_context(dynamo_config.patch(_DYNAMO))
        settings.enter_context(inductor_config.patch(inductor | options))
        settings.enter_context(
            inductor_pdl_waits()
            if device.type == "cuda"
            else inductor_patches.cached_vec_isa_checks()
        )
        settings.enter_context(inductor_patches.avx2_without_avx512())
        settings.enter_context(inductor_patches.safe_reduction_tiling())
        settings.enter_context(thread_local_fx_patches())
        tag = f"{compiler_config.cache_key_tag}{inductor_patches.TAG}"
        settings.enter_context(compiler_config.patch(cache_key_tag=tag))  # type: ignore[attr-defined]  # torch adds it
        settings.enter_context(recover_failed_capture(device))
        yield


def check_options(options: dict[str, Any]) -> None:
    """Refuse what Inductor does not know; raises ValueError."""
    known = torch._inductor.list_options()
    for name in options:
        if name not in known:
            matches = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {matches[0]!r}?" if matches else ""
            raise ValueError(f"compile.options: Inductor has no option {name!r}{hint}")


def release(compiled: CompiledStep, device: torch.device) -> None:
    """Let go of its recording; it must not be launched again."""
    drop_recording(compiled.recording, device)
