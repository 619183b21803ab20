"""Compile and launch a step, in one of two ways.

`direct` performs the parts of torch.compile(mode="reduce-overhead") one by one, so that each can be
saved: it compiles the step ahead of time without guards, records it through the CUDA graph trees in
two warm calls, and replays the tree's recording from then on, which costs the host a few
microseconds. `torch` is the mode itself, with its guards and tree checks.
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
from compiled_llm.system.torch_patches import (
    AOT_COMPILED_FUNCTION,
    CACHE_KEY_TAG,
    CUDA_DEVICE_GUARD,
    LIST_OPTIONS,
)
from passes import Pipeline
from passes.ops.pdl import inductor_pdl_options, inductor_pdl_waits

Launch = Callable[[], object]

_DYNAMO = {
    "enable_aot_compile": True,
    # Buckets share one code object but never their guards, so that the limits on recompilation of
    # one code object would only stop the compilation of further buckets.
    "recompile_limit": 4096,
    "accumulated_recompile_limit": 4096,
}
_INDUCTOR = {
    # A partitioned graph would be several launches.
    "graph_partition": False,
    "triton.cudagraph_or_error": True,
    # The host checks indices, once per request.
    "assert_indirect_indexing": False,
    # Inductor times products with padded shapes, so that the graph could differ between runs.
    "shape_padding": False,
}


if not torch.cuda.is_available():
    # Without a GPU, the first thread that traces creates a thread-local CUDA device guard that all
    # other threads use, and that is freed when that thread ends, which crashes the process. The
    # thread that imports this module, usually the main thread, creates it instead.
    CUDA_DEVICE_GUARD.get()()


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledStep:
    """A step that is ready to launch.

    Attributes:
        launch: runs the step once.
        graph: whether `launch` only replays a CUDA graph.
        guarded: whether `launch` checks guards, and may compile or record again.
        recording: the graph-tree node that `launch` replays, or None.
        function: the compiled function. It must live as long as `launch` is called: torch frees
            the graph trees and the memory of their recordings with the last compiled function.
        seconds: durations of its parts; for a saved step, compiling is loading.
        graph_digest: digest of the graph it was compiled from; "" if unknown.
    """

    launch: Launch
    graph: bool
    guarded: bool = False
    recording: object
    function: object
    seconds: Durations
    graph_digest: str = ""


class Dispatch(Protocol):
    """Compile a step with the given passes and Inductor options, or load it; then capture it.

    `saved` is the result of `serialize` or `compile_only`. Any exception means failure.
    """

    def __call__(
        self, step: Step, pipeline: Pipeline, options: dict[str, Any], saved: bytes | None = None
    ) -> CompiledStep: ...


def direct(
    step: Step, pipeline: Pipeline, options: dict[str, Any], saved: bytes | None = None
) -> CompiledStep:
    """Compile ahead of time, record through the graph trees and replay the recording."""
    device = step.state.tokens.device
    began = Timestamp.now()
    with _compiler_settings(device, pipeline, options):
        if saved is None:
            compiled, digest = _compile_with_digest(step)
        else:
            compiled, digest = AOT_COMPILED_FUNCTION.get().deserialize(saved, {}), ""
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
        function=compiled,
        seconds=durations(began, compiled_at, Timestamp.now()),
        graph_digest=digest,
    )


def compile_only(step: Step, pipeline: Pipeline, options: dict[str, Any]) -> tuple[bytes, str]:
    """Compile a step without running it, so that its tensors need no memory.

    Returns:
        The argument `saved` of `direct`, and the digest of the step's graph.
    """
    with _compiler_settings(step.state.tokens.device, pipeline, options):
        compiled, digest = _compile_with_digest(step)
        return AOTCompiledFunction.serialize(compiled).serialized_data, digest


@torch.no_grad()
def trace_digest(step: Step) -> str:
    """Return the digest of the graph that `direct` compiles; see `graph_digest.trace`."""
    with COMPILER_LOCK, thread_local_fx_patches(), dynamo_config.patch(_DYNAMO):
        return graph_digest.trace(lambda: _compile(step))


def serialize(compiled: CompiledStep) -> bytes:
    """Serialize a step that `direct` compiled; the result is its argument `saved`."""
    assert isinstance(compiled.function, AOTCompiledFunction)
    return AOTCompiledFunction.serialize(compiled.function).serialized_data


def _compile_with_digest(step: Step) -> tuple[AOTCompiledFunction, str]:
    with graph_digest.record_digests() as digests:
        return _compile(step), digests[-1]


def _compile(step: Step) -> AOTCompiledFunction:
    """Compile a step ahead of time, without guards."""
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
    """Compile with torch.compile(mode="reduce-overhead"); the result cannot be saved."""
    device = step.state.tokens.device
    began = Timestamp.now()
    compiled = torch.compile(step.forward, fullgraph=True, dynamic=False, mode="reduce-overhead")

    def launch() -> None:
        with COMPILER_LOCK:  # guards read state that the start-up of another engine changes
            # Once one engine marks its steps, torch no longer counts steps by itself.
            torch.compiler.cudagraph_mark_step_begin()
            compiled()

    with _compiler_settings(device, pipeline, options):
        launch()
        compiled_at = Timestamp.now()
        launch()
    return CompiledStep(
        launch=launch,
        graph=False,
        guarded=True,
        recording=None,
        function=compiled,
        seconds=durations(began, compiled_at, Timestamp.now()),
    )


DISPATCHES: dict[str, Dispatch] = {"direct": direct, "torch": via_torch}


@contextmanager
def _compiler_settings(
    device: torch.device, pipeline: Pipeline, options: dict[str, Any]
) -> Iterator[None]:
    """Apply the settings and patches of the compiler to one compilation and capture.

    One engine at a time enters. Compilations of the user are not affected. The cudagraph option is
    set globally and not by `options=`, because loading a cached graph reads the global one
    (pytorch#155703).
    """
    inductor = {**_INDUCTOR, "post_grad_custom_pre_pass": pipeline}
    if device.type == "cuda":
        inductor |= {
            "triton.cudagraphs": True,
            # Launch independent kernels, such as those of queries and keys, together.
            "combo_kernels": True,
            **inductor_pdl_options(pipeline.context.num_tokens),
        }
        device_patches = inductor_pdl_waits()
    else:
        device_patches = inductor_patches.cached_vec_isa_checks()
    tag = f"{CACHE_KEY_TAG.get()}{inductor_patches.CACHE_TAG}"
    with COMPILER_LOCK, ExitStack() as settings:
        settings.enter_context(dynamo_config.patch(_DYNAMO))
        settings.enter_context(inductor_config.patch(inductor | options))
        settings.enter_context(device_patches)
        settings.enter_context(inductor_patches.avx2_without_avx512())
        settings.enter_context(inductor_patches.safe_reduction_tiling())
        settings.enter_context(thread_local_fx_patches())
        patch_config: Any = compiler_config.patch  # type: ignore[attr-defined]  # added by torch
        settings.enter_context(patch_config(cache_key_tag=tag))
        settings.enter_context(recover_failed_capture(device))
        yield


def check_options(options: dict[str, Any]) -> None:
    """Raise ValueError for the name of an option that Inductor does not have."""
    known = LIST_OPTIONS.get()()
    for name in options:
        if name not in known:
            matches = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {matches[0]!r}?" if matches else ""
            raise ValueError(f"compile.options: Inductor has no option {name!r}{hint}")


def release(compiled: CompiledStep, device: torch.device) -> None:
    """Drop the recording of a step; it must not be launched again."""
    drop_recording(compiled.recording, device)
