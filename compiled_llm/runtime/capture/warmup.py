"""Compiles and captures buckets, or loads them from an artifact.

A CUDA graph bakes in addresses, so the paged cache is allocated first (see `allocation`). The
buckets are captured after it, large to small, so that the later ones fit into the memory pool of
the first.
"""

import gc
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import torch

from compiled_llm.config.schema import Config
from compiled_llm.errors import StrictError
from compiled_llm.report.report import BucketReport, BucketState
from compiled_llm.runtime.artifacts.artifact import Artifact, SavedBucket, read_traffic
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.build_context import BuildContext
from compiled_llm.runtime.capture.captured_bucket import CapturedBucket
from compiled_llm.runtime.capture.graph_budget import GraphBudget, order_by_usefulness
from compiled_llm.runtime.capture.progress import bucket_progress
from compiled_llm.runtime.compilation.compiler import (
    DISPATCHES,
    CompiledStep,
    check_options,
    release,
    serialize,
    trace_digest,
)
from compiled_llm.runtime.compilation.compiler_cache import private_compiler_cache
from compiled_llm.runtime.compilation.cuda_graph_trees import graph_bytes
from compiled_llm.runtime.compilation.pipeline import make_pipeline
from compiled_llm.runtime.compilation.worker_pool import CompilePool, compile_in_pool
from compiled_llm.runtime.memory.allocation import stage_padding
from compiled_llm.runtime.step.step import Step
from passes import PassError, PassReport, Pipeline
from passes.ops.precompile import compile_kernels

_log = logging.getLogger(__name__)


def compile_buckets(
    buckets: Sequence[Bucket],
    context: BuildContext,
    *,
    progress: bool,
    budget: GraphBudget | None = None,
    pool: CompilePool | None = None,
) -> list[CapturedBucket]:
    """Compile and capture the buckets; large to small, or by usefulness under `memory.graphs`.

    Buckets in the artifact are loaded from it, the others are compiled and saved to it. Where
    saving fails, a warning gives the reason. A bucket that fails has `compiled=None`, and its steps
    run eagerly; with `strict` this is an error. A bucket that exceeds `memory.graphs` is left out.

    Args:
        buckets: to compile.
        context: of the engine.
        progress: whether to show a progress bar.
        budget: counts the memory of the graphs; a new one by default.
        pool: compiles buckets in processes of its own; by default a new one is started if the
            config allows several processes.

    Returns:
        The buckets in the order given.

    Raises:
        ValueError: an Inductor option is unknown.
        PassError: a pass found fewer matches than the model's config implies. A fallback to eager
            would hide this.
        StrictError: a bucket failed and the config is strict.
    """
    config = context.config
    check_options(config.compile.options)
    captured = {
        bucket: CapturedBucket(
            bucket=bucket, report=BucketReport(bucket=str(bucket), size=bucket.size)
        )
        for bucket in buckets
    }
    budget = budget or make_graph_budget(config, context.device)
    ordered = _capture_order(buckets, context)
    with (
        bucket_progress(len(buckets), context.device, enabled=progress) as show,
        private_compiler_cache(),
        compile_in_pool(pool, ordered, context) as running_pool,
    ):
        for bucket in ordered:
            entry = captured[bucket]
            refusal = budget.refusal(bucket)
            if refusal is None:
                _build_bucket(entry, context, running_pool)
                _enforce_budget(budget, entry, context.device)
            else:
                entry.report.state = BucketState.LEFT_OUT
                entry.report.failure = refusal
            show(entry)
    built = list(captured.values())
    _warn_of_left_out(built, context)
    _warn_of_unsaved(built)
    return built


def make_graph_budget(config: Config, device: torch.device) -> GraphBudget:
    """Return a budget of `memory.graphs` for the graphs that are captured from now on."""
    limit = None if config.memory.graphs == "auto" else config.memory.graphs
    return GraphBudget(limit, partial(graph_bytes, device))


def _capture_order(buckets: Sequence[Bucket], context: BuildContext) -> list[Bucket]:
    ordered = sorted(buckets, key=lambda bucket: bucket.cost, reverse=True)
    if context.config.memory.graphs == "auto":
        return ordered
    artifact = context.artifact
    traffic = read_traffic(artifact.directory) if artifact is not None else {}
    return order_by_usefulness(ordered, traffic)


def _build_bucket(
    entry: CapturedBucket, context: BuildContext, running_pool: CompilePool | None
) -> None:
    began = time.perf_counter()
    in_pool = running_pool is not None and running_pool.wait(entry.bucket)
    waited = time.perf_counter() - began
    stage_padding(context.memory.state, entry.bucket)
    _compile_or_load(entry, context, compiled_now=in_pool)
    if in_pool and entry.report.loaded:
        # The pool has compiled it for this start; the artifact only passed it on.
        entry.report.loaded = False
        entry.report.compile_seconds += waited


def _compile_or_load(entry: CapturedBucket, context: BuildContext, *, compiled_now: bool) -> None:
    """Set the entry's step and report. `compiled_now`: the artifact's bucket is from this start."""
    report, device, artifact = entry.report, context.device, context.artifact
    config, notices = context.config, context.report.warnings
    pipeline = make_pipeline(config, entry.bucket, context.model, context.layers)
    step = context.memory.step(context.model, entry.bucket)
    graph_bytes_before = graph_bytes(device)
    dispatch = DISPATCHES[config.compile.dispatch]
    compile_step = partial(dispatch, step, pipeline, dict(config.compile.options))
    loaded = None
    try:
        if artifact is not None:
            verified_step = step if artifact.by_graph and not compiled_now else None
            loaded = _load(artifact, report, compile_step, verified_step, notices)
        compiled, passes = loaded or (compile_step(), pipeline.reports)
    except Exception as error:
        _raise_pass_error(error)
        message = (str(error).strip().splitlines() or ["no message"])[0]
        report.failure = f"{type(error).__name__}: {message}"
        if config.strict:
            raise StrictError(
                f"bucket {entry.bucket} could not be compiled: {report.failure}"
            ) from error
    if report.failure is not None:
        # Outside of the handler, the error's frames no longer hold memory.
        _free_memory(device)
        return
    entry.compiled = compiled
    report.state = BucketState.GRAPH if compiled.graph else BucketState.COMPILED
    for name, seconds in compiled.seconds.items():
        setattr(report, name, getattr(report, name) + seconds)
    report.bytes = graph_bytes(device) - graph_bytes_before
    report.loaded = loaded is not None
    report.passes = passes
    if loaded is None and artifact is not None:
        report.save_failure = _save(artifact, entry.bucket, compiled, pipeline, notices)
    report.saved = artifact is not None and report.save_failure is None


def _load(
    artifact: Artifact,
    report: BucketReport,
    compile_step: Callable[..., CompiledStep],
    step: Step | None,
    notices: list[str],
) -> tuple[CompiledStep, list[PassReport]] | None:
    """Load the bucket and capture it; None if the artifact has none that works.

    With a `step`, the saved bucket must have been compiled from the graph of this step.
    """
    try:
        saved = artifact.load(report.bucket)
        if saved is None:
            return None
        if step is not None and not _has_same_graph(step, saved, report):
            notices.append(
                f"{report.bucket} in {artifact.directory} was compiled from another graph: "
                "it is compiled again"
            )
            return None
        loaded = compile_step(saved=saved.step), saved.passes
        with suppress(OSError):  # the damage stays, and the next start reports it again
            artifact.repair()
        return loaded
    except Exception as error:  # unpickling and capturing may raise anything
        notices.append(
            f"{report.bucket} in {artifact.directory} could not be used and is compiled again: "
            f"{error}"
        )
        return None


def _has_same_graph(step: Step, saved: SavedBucket, report: BucketReport) -> bool:
    began = time.perf_counter()
    digest = trace_digest(step)
    report.trace_seconds += time.perf_counter() - began
    return digest == saved.graph_digest


def _save(
    artifact: Artifact,
    bucket: Bucket,
    compiled: CompiledStep,
    pipeline: Pipeline,
    notices: list[str],
) -> str | None:
    """Save the bucket; return the reason if that fails."""
    try:
        kernels = compile_kernels(pipeline.kernel_calls)
        saved = SavedBucket(
            step=serialize(compiled),
            passes=pipeline.reports,
            kernels=kernels,
            graph_digest=compiled.graph_digest,
        )
        artifact.save(str(bucket), saved)
    except Exception as error:  # such as a full disk; pickling may raise anything
        notices.append(f"{bucket} could not be saved in {artifact.directory}: {error}")
        return notices[-1]
    return None


def _raise_pass_error(error: BaseException | None) -> None:
    """Raise the PassError among the causes of an error of Inductor, if there is one."""
    while error is not None:
        if isinstance(error, PassError):
            raise error
        error = error.__cause__ or error.__context__


def _enforce_budget(budget: GraphBudget, entry: CapturedBucket, device: torch.device) -> None:
    """Release the bucket's recording if it exceeds the budget."""
    if entry.compiled is None:
        return
    excess = budget.record_capture(entry.bucket, entry.report.bytes)
    if excess is not None:
        release(entry.compiled, device)
        entry.compiled = None
        entry.report.state = BucketState.LEFT_OUT
        entry.report.failure = excess
        _free_memory(device)


def _free_memory(device: torch.device) -> None:
    """Return memory that no tensor and no recording uses to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _warn_of_left_out(built: list[CapturedBucket], context: BuildContext) -> None:
    names = [str(entry.bucket) for entry in built if entry.report.state is BucketState.LEFT_OUT]
    if names:
        context.report.warn(
            f"memory.graphs has no space for {', '.join(names)}: "
            "their steps run in larger buckets, or eagerly"
        )


def _warn_of_unsaved(built: list[CapturedBucket]) -> None:
    reasons = [entry.report.save_failure for entry in built if entry.report.save_failure]
    if reasons:
        _log.warning(
            "%d of %d buckets were compiled and not saved: %s",
            len(reasons),
            len(built),
            reasons[0],
        )
