"""The start of an engine, in the order that graphs force on it: a graph bakes in addresses, so the paged cache is allocated
first (see `allocation`), and each bucket, large to small, is compiled and recorded after it.
"""

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from compiled_llm.config.schema import Config
from compiled_llm.errors import StrictError
from compiled_llm.models.discovery import AttentionLayer
from compiled_llm.models.exported_model import ServedModel
from compiled_llm.report.report import BucketReport, BucketState, Report
from compiled_llm.runtime.artifacts.artifact import Artifact, SavedBucket, read_traffic
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.capture.captured_bucket import CapturedBucket
from compiled_llm.runtime.capture.graph_budget import GraphBudget, order_by_usefulness
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
from compiled_llm.runtime.memory.allocation import Memory, stage_padding
from compiled_llm.runtime.step.step import Step
from compiled_llm.system.device_memory import free_bytes
from passes import PassError, PassReport, Pipeline
from passes.ops.precompile import compile_kernels

_log = logging.getLogger(__name__)


def compile_buckets(
    buckets: Sequence[Bucket], model: ServedModel, layers: list[AttentionLayer], memory: Memory, config: Config,
    artifact: Artifact | None, report: Report, *, progress: bool, budget: GraphBudget | None = None,
    pool: CompilePool | None = None,
) -> list[CapturedBucket]:  # fmt: skip
    """Compile and capture each bucket: large to small, or with `memory.graphs` the most useful first.

    A bucket that fails is left to eager; with `strict` it is an error. One that `memory.graphs` has no room for is left out.

    What the artifact has is not compiled, and what is compiled goes into it; where that fails, a warning says so. If the config
    lets several processes compile, they do so in the pool, or in a new one. A budget that is given also counts what was captured
    before.

    Raises:
        ValueError: an Inductor option is unknown.
        PassError: a pass found less than the model's config says, which no fallback may hide.
        StrictError: a bucket failed and the config is strict.
    """
    check_options(config.compile.options)
    entries = [
        CapturedBucket(bucket=bucket, report=BucketReport(bucket=str(bucket), size=bucket.size))
        for bucket in buckets
    ]
    budget = budget or graph_budget(config, model.device)
    ordered = sorted(buckets, key=lambda bucket: bucket.cost, reverse=True)
    if config.memory.graphs != "auto":
        ordered = order_by_usefulness(
            ordered, read_traffic(artifact.directory) if artifact is not None else {}
        )
    by_bucket = {entry.bucket: entry for entry in entries}
    working = compile_in_pool(pool, ordered, (model, layers, memory), config, artifact, report)
    with (
        _progress(len(entries), enabled=progress) as show,
        private_compiler_cache(),
        working as others,
    ):
        for entry in (by_bucket[bucket] for bucket in ordered):
            refusal = budget.refusal(entry.bucket)
            if refusal is not None:
                entry.report.state, entry.report.failure = BucketState.LEFT_OUT, refusal
                show(entry, model.device)
                continue
            began = time.perf_counter()
            by_others = others is not None and others.wait(entry.bucket)
            waited = time.perf_counter() - began
            stage_padding(memory.state, entry.bucket)
            pipeline = make_pipeline(config, entry.bucket, model, layers)
            step = memory.step(model, entry.bucket)
            _compile(
                entry, step, pipeline, config, artifact, report.warnings, compiled_now=by_others
            )
            if by_others and entry.report.loaded:
                entry.report.loaded, entry.report.compile_seconds = (
                    False,
                    waited + entry.report.compile_seconds,
                )
            _keep_within(budget, entry, model.device)
            show(entry, model.device)
    left_out = [
        str(entry.bucket) for entry in entries if entry.report.state is BucketState.LEFT_OUT
    ]
    if left_out:
        report.warn(
            f"memory.graphs has no room for {', '.join(left_out)}: larger buckets, or eager, serve instead"
        )
    _warn_of_unkept(entries)
    return entries


def _warn_of_unkept(entries: list[CapturedBucket]) -> None:
    reasons = [
        entry.report.save_failure for entry in entries if entry.report.save_failure is not None
    ]
    if reasons:
        _log.warning(
            "%d of %d buckets were compiled and not saved: %s",
            len(reasons),
            len(entries),
            reasons[0],
        )


def graph_budget(config: Config, device: torch.device) -> GraphBudget:
    """What the config allows recordings to take from now on."""
    return GraphBudget(
        None if config.memory.graphs == "auto" else config.memory.graphs,
        partial(graph_bytes, device),
    )


def _keep_within(budget: GraphBudget, entry: CapturedBucket, device: torch.device) -> None:
    """Give a recording back that goes beyond the budget."""
    if entry.compiled is None:
        return
    excess = budget.measure(entry.bucket, entry.report.bytes)
    if excess is not None:
        release(entry.compiled, device)
        entry.compiled, entry.report.state, entry.report.failure = (
            None,
            BucketState.LEFT_OUT,
            excess,
        )
        _give_back(device)


def _give_back(device: torch.device) -> None:
    """What no tensor and no recording holds any more, to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _compile(
    entry: CapturedBucket, step: Step, pipeline: Pipeline, config: Config, artifact: Artifact | None, notices: list[str], *,
    compiled_now: bool,
) -> None:  # fmt: skip
    report, device = entry.report, step.state.tokens.device
    held = graph_bytes(device)
    compile_or_load = partial(
        DISPATCHES[config.compile.dispatch], step, pipeline, dict(config.compile.options)
    )
    try:
        checked = None if compiled_now or artifact is None or not artifact.by_graph else step
        loaded = (
            _load(artifact, report, compile_or_load, checked, notices)
            if artifact is not None
            else None
        )
        compiled, passes = loaded or (compile_or_load(), pipeline.reports)
    except Exception as error:
        _raise_pass_error(error)
        report.failure = (
            f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
        )
        if config.strict:
            raise StrictError(
                f"bucket {entry.bucket} could not be compiled: {report.failure}"
            ) from error
    if report.failure is not None:
        _give_back(
            device
        )  # no longer held by the error's frames; others may have room where it had not
        return
    entry.compiled = compiled
    report.state = BucketState.GRAPH if compiled.graph else BucketState.COMPILED
    for name, seconds in compiled.seconds.items():
        setattr(report, name, getattr(report, name) + seconds)
    report.bytes = graph_bytes(device) - held
    report.loaded, report.passes = loaded is not None, passes
    if loaded is None and artifact is not None:
        report.save_failure = _save(artifact, entry.bucket, compiled, pipeline, notices)
    report.saved = artifact is not None and report.save_failure is None


def _load(
    artifact: Artifact,
    report: BucketReport,
    load: Callable[..., CompiledStep],
    step: Step | None,
    notices: list[str],
) -> tuple[CompiledStep, list[PassReport]] | None:
    """The bucket as the artifact has it; None where that has none, or none that works, or one of another graph than the step's."""
    try:
        kept = artifact.load(report.bucket)
        if kept is None:
            return None
        if step is not None and not _has_graph(step, kept, report):
            notices.append(
                f"{report.bucket} in {artifact.directory} was compiled from another graph: it is compiled anew"
            )
            return None
        loaded = load(saved=kept.step), kept.passes
        with suppress(OSError):  # what is damaged then stays so, and the next start says it again
            artifact.repair()
        return loaded
    except Exception as error:  # whatever unpickling and capturing may raise
        notices.append(
            f"{report.bucket} in {artifact.directory} could not be used, and is compiled anew: {error}"
        )
        return None


def _has_graph(step: Step, kept: SavedBucket, report: BucketReport) -> bool:
    began = time.perf_counter()
    digest = trace_digest(step)
    report.trace_seconds += time.perf_counter() - began
    return digest == kept.graph_digest


def _save(
    artifact: Artifact,
    bucket: Bucket,
    compiled: CompiledStep,
    pipeline: Pipeline,
    notices: list[str],
) -> str | None:
    """Keep the bucket; why it could not be kept, if it could not."""
    digest = compiled.graph_digest
    try:
        kernels = compile_kernels(pipeline.kernel_calls)
        artifact.save(
            str(bucket),
            SavedBucket(
                step=serialize(compiled),
                passes=pipeline.reports,
                kernels=kernels,
                graph_digest=digest,
            ),
        )
    except Exception as error:  # a full disk, or whatever pickling raises
        notices.append(f"{bucket} could not be kept in {artifact.directory}: {error}")
        return notices[-1]
    return None


def _raise_pass_error(error: BaseException | None) -> None:
    """Inductor wraps what a pass raises."""
    while error is not None:
        if isinstance(error, PassError):
            raise error
        error = error.__cause__ or error.__context__


@contextmanager
def _progress(
    total: int, *, enabled: bool
) -> Iterator[Callable[[CapturedBucket, torch.device], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, quiet=not enabled), transient=True) as bar:
        task = bar.add_task("compiling buckets", total=total)

        def show(entry: CapturedBucket, device: torch.device) -> None:
            report = entry.report
            if report.state is BucketState.FAILED:
                _log.warning("bucket %s is not used: %s", entry.bucket, report.failure)
            else:
                outcome = report.failure or (
                    f"compiled in {report.compile_seconds:.1f} s, "
                    f"captured in {report.capture_seconds:.1f} s"
                )
                free = free_bytes(device) / 2**30
                bar.console.print(
                    f"{entry.bucket}: {outcome}, {free:.1f} GiB free", highlight=False
                )
            bar.advance(task)

        yield show
