"""An engine's buckets, made: compiled or loaded, captured, and verified where the config says so."""

import logging
from collections.abc import Sequence

from compiled_llm.config.schema import Config
from compiled_llm.models.discovery import AttentionLayer
from compiled_llm.models.exported_model import ServedModel, underlying_model
from compiled_llm.report.report import BucketReport, Report
from compiled_llm.runtime.artifacts.artifact import Artifact
from compiled_llm.runtime.artifacts.cache import evict_lru, refuse_artifact
from compiled_llm.runtime.artifacts.model_source import snapshot
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.capture.captured_bucket import CapturedBucket
from compiled_llm.runtime.capture.lazy import pending
from compiled_llm.runtime.capture.warmup import compile_buckets, graph_budget
from compiled_llm.runtime.compilation.timing import split_phase
from compiled_llm.runtime.compilation.worker_pool import CompilePool
from compiled_llm.runtime.limits import Limits
from compiled_llm.runtime.memory.allocation import Memory
from compiled_llm.runtime.verify.verify import verify_bucket

_log = logging.getLogger(__name__)


class BucketBuilder:
    """Makes buckets for one engine, all at its start or one at a time later.

    Args:
        model: whose steps they are.
        layers: its attention layers.
        memory: what the steps work on.
        config: what is wanted of them.
        limits: of the engine's batches.
        artifact: where they are kept, if they are.
        report: where phases and warnings go.
    """

    def __init__(
        self, model: ServedModel, layers: list[AttentionLayer], memory: Memory, config: Config, limits: Limits,
        artifact: Artifact | None, report: Report,
    ) -> None:  # fmt: skip
        self._model, self._layers, self._memory, self._limits = model, layers, memory, limits
        self._config, self._artifact, self._report = config, artifact, report
        self._budget = graph_budget(config, model.device)
        by_source = artifact is not None and not artifact.by_graph
        self._snapshot = snapshot(underlying_model(model)) if by_source else None

    def build_all(
        self, buckets: Sequence[Bucket], *, progress: bool, pool: CompilePool | None
    ) -> list[CapturedBucket]:
        """The entries of a start; with `compile.capture: lazy` all of them are to come. Raises what `compile_buckets` does."""
        if self._config.compile.capture == "lazy":
            self._evict_lru()
            return pending(buckets)
        with self._report.phase("compile and capture", self._model.device):
            entries = self._compile(buckets, progress=progress, pool=pool)
        self._report.phases[-1:] = split_phase(
            self._report.phases[-1], [entry.report for entry in entries]
        )
        self._evict_lru()
        if self._config.verify:
            with self._report.phase("verify", self._model.device):
                self._verify(entries)
        return entries

    def build(self, bucket: Bucket) -> CapturedBucket:
        """The entry of a bucket that was pending. A failure costs this bucket alone; its report and a warning give the reason."""
        if self._snapshot is not None and self._snapshot != snapshot(underlying_model(self._model)):
            self._snapshot = self._artifact = None
            refuse_artifact(
                self._report,
                "the model was changed since it was loaded: what is compiled from now on is not kept",
            )
        try:
            entries = self._compile([bucket], progress=False)
            if self._config.verify:
                self._verify(entries)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            _log.warning("bucket %s is not used: %s", bucket, failure)
            return CapturedBucket(
                bucket=bucket,
                report=BucketReport(bucket=str(bucket), size=bucket.size, failure=failure),
            )
        return entries[0]

    def _compile(
        self, buckets: Sequence[Bucket], *, progress: bool, pool: CompilePool | None = None
    ) -> list[CapturedBucket]:
        model, layers, memory, config, artifact = (
            self._model,
            self._layers,
            self._memory,
            self._config,
            self._artifact,
        )
        return compile_buckets(
            buckets,
            model,
            layers,
            memory,
            config,
            artifact,
            self._report,
            progress=progress,
            budget=self._budget,
            pool=pool,
        )

    def _evict_lru(self) -> None:
        if self._artifact is not None:
            evict_lru(self._artifact, self._config.compile.cache_limit, self._report)

    def _verify(self, entries: Sequence[CapturedBucket]) -> None:
        """Give up the buckets that differ from eager, and what is kept of them."""
        for entry in entries:
            verify_bucket(
                entry, self._model, self._memory, self._limits, strict=self._config.strict
            )
            if self._artifact is not None and entry.report.verification and entry.compiled is None:
                self._artifact.drop(str(entry.bucket))
                entry.report.saved = False
