"""Sets up a model runner: resolves its limits, allocates its memory, and builds its buckets."""

from dataclasses import dataclass, replace

import torch

from compiled_llm.config.schema import Config
from compiled_llm.models.discovery import AttentionLayer
from compiled_llm.models.exported_model import ServedModel
from compiled_llm.models.state_discovery import supports_state_continuation
from compiled_llm.report.report import Report
from compiled_llm.runtime.artifact_setup import with_artifact
from compiled_llm.runtime.bucket_builder import BucketBuilder
from compiled_llm.runtime.bucket_tuning import Traffic
from compiled_llm.runtime.buckets import Bucket, BucketKind, plan_buckets
from compiled_llm.runtime.build_context import BuildContext
from compiled_llm.runtime.capture.bucket_selector import BucketSelector
from compiled_llm.runtime.capture.captured_bucket import CapturedBucket
from compiled_llm.runtime.capture.lazy import LazyBuckets
from compiled_llm.runtime.compilation.cuda_graph_trees import graph_events, graph_pool
from compiled_llm.runtime.compilation.worker_pool import CompilePool
from compiled_llm.runtime.limits import Limits
from compiled_llm.runtime.memory.allocation import allocate


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerSetup:
    """What a model runner starts with.

    Attributes:
        context: what its buckets are built from.
        selector: selects the bucket of a batch.
        lazy: builds pending buckets.
        traffic: counts of steps by size, empty.
        separate_decode: see `ModelRunner`.
    """

    context: BuildContext
    selector: BucketSelector
    lazy: LazyBuckets
    traffic: dict[BucketKind, Traffic]
    separate_decode: bool


@torch.no_grad()
def set_up_runner(
    model: ServedModel,
    layers: list[AttentionLayer],
    config: Config,
    report: Report,
    *,
    progress: bool,
    pool: CompilePool | None,
    just_loaded: bool,
) -> RunnerSetup:
    """Allocate the memory of an engine and build its buckets. For the arguments see `ModelRunner`.

    Raises:
        ValueError: the config does not fit the model or the device.
        PassError, StrictError: see `compile_buckets`.
    """
    limits = _resolve_limits(model, config, report)
    buckets = plan_buckets(
        config.buckets, limits, prefill_chunks=supports_state_continuation(model)
    )
    memory = allocate(model, layers, config, limits, report)
    if memory.states is not None and config.cache.prefix_caching:
        report.warn(f"{model.config.model_type} has recurrent states, so prompts share no pages")
    context = BuildContext(
        model=model,
        layers=layers,
        memory=memory,
        config=config,
        limits=limits,
        artifact=None,
        report=report,
        just_loaded=just_loaded,
    )
    context = with_artifact(context)
    builder = BucketBuilder(context)
    captured = None
    if config.compile.dispatch != "eager":
        planned = [*buckets["prefill"], *buckets["decode"]]
        captured = builder.build_all(planned, progress=progress, pool=pool)
    _report_buckets(captured or [], context)
    lazy = LazyBuckets(builder.build)
    selector = BucketSelector(
        buckets, captured, report, strict=config.strict, on_demand=lazy.record_demand
    )
    only_prefill = bool(captured is not None and buckets["prefill"] and not buckets["decode"])
    return RunnerSetup(
        context=context,
        selector=selector,
        lazy=lazy,
        traffic=_empty_traffic(buckets, limits),
        separate_decode=memory.states is not None or not only_prefill,
    )


def _report_buckets(captured: list[CapturedBucket], context: BuildContext) -> None:
    counters, device = context.report.counters, context.device
    counters.graphs, counters.pool_bytes = graph_pool(device)
    context.report.buckets = [entry.report for entry in captured]
    counters.graph_events = dict.fromkeys(graph_events(device), 0)


def _empty_traffic(
    buckets: dict[BucketKind, list[Bucket]], limits: Limits
) -> dict[BucketKind, Traffic]:
    largest: dict[BucketKind, int] = {
        "decode": limits.max_num_seqs,
        "prefill": limits.max_num_batched_tokens,
    }
    return {
        kind: Traffic(limit=largest[kind], buckets=sorted({bucket.size for bucket in of_kind}))
        for kind, of_kind in buckets.items()
    }


def _resolve_limits(model: ServedModel, config: Config, report: Report) -> Limits:
    limits = Limits.resolve(config.limits, model.config, model.device)
    if limits.warning:
        report.warn(limits.warning)
    if supports_state_continuation(model):
        return limits
    report.warn(
        f"{model.config.model_type} cannot continue from its recurrent states with several tokens "
        "at once, so prompts are prefilled one token a step, and "
        f"limits.max_num_batched_tokens={limits.max_num_batched_tokens} is not used"
    )
    return replace(limits, max_num_batched_tokens=1)
