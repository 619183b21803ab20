"""Builds the buckets of an engine: compiles or loads, captures, and verifies them."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from compiled_llm.models.exported_model import underlying_model
from compiled_llm.report.report import BucketReport
from compiled_llm.runtime.artifacts.cache import evict_lru, refuse_artifact
from compiled_llm.runtime.artifacts.model_source import snapshot
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.build_context import BuildContext
from compiled_llm.runtime.capture.captured_bucket import CapturedBucket
from compiled_llm.runtime.capture.lazy import pending_buckets
from compiled_llm.runtime.capture.warmup import compile_buckets, make_graph_budget
from compiled_llm.runtime.compilation.timing import split_phase
from compiled_llm.runtime.compilation.worker_pool import CompilePool
from compiled_llm.runtime.verify.verify import verify_bucket

_log = logging.getLogger(__name__)


class BucketBuilder:
    """Builds the buckets of one engine, all at its start or one at a time later."""

    def __init__(self, context: BuildContext) -> None:
        self._context = context
        self._budget = make_graph_budget(context.config, context.device)
        artifact = context.artifact
        by_source = artifact is not None and not artifact.by_graph
        self._model_snapshot = snapshot(underlying_model(context.model)) if by_source else None

    def build_all(
        self, buckets: Sequence[Bucket], *, progress: bool, pool: CompilePool | None
    ) -> list[CapturedBucket]:
        """Build all buckets, or, with `compile.capture: lazy`, return them all as pending.

        Raises:
            ValueError, PassError, StrictError: see `compile_buckets` and `verify_bucket`.
        """
        config, report, device = self._context.config, self._context.report, self._context.device
        if config.compile.capture == "lazy":
            self._evict_artifacts()
            return pending_buckets(buckets)
        with report.phase("compile and capture", device):
            built = self._compile(buckets, progress=progress, pool=pool)
        report.phases[-1:] = split_phase(report.phases[-1], [bucket.report for bucket in built])
        self._evict_artifacts()
        if config.verify:
            with report.phase("verify", device):
                self._verify(built)
        return built

    def build(self, bucket: Bucket) -> CapturedBucket:
        """Build a pending bucket.

        A failure affects this bucket alone: its report and a warning give the reason.
        """
        self._check_model_source()
        try:
            built = self._compile([bucket], progress=False)
            if self._context.config.verify:
                self._verify(built)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            _log.warning("bucket %s is not used: %s", bucket, failure)
            report = BucketReport(bucket=str(bucket), size=bucket.size, failure=failure)
            return CapturedBucket(bucket=bucket, report=report)
        return built[0]

    def _check_model_source(self) -> None:
        """Stop saving buckets if the model was changed since it was loaded."""
        model = underlying_model(self._context.model)
        if self._model_snapshot is None or self._model_snapshot == snapshot(model):
            return
        self._model_snapshot = None
        self._context = replace(self._context, artifact=None)
        refuse_artifact(
            self._context.report,
            "the model was changed since it was loaded: "
            "buckets that are compiled from now on are not saved",
        )

    def _compile(
        self, buckets: Sequence[Bucket], *, progress: bool, pool: CompilePool | None = None
    ) -> list[CapturedBucket]:
        return compile_buckets(
            buckets, self._context, progress=progress, budget=self._budget, pool=pool
        )

    def _evict_artifacts(self) -> None:
        artifact, config = self._context.artifact, self._context.config
        if artifact is not None:
            evict_lru(artifact, config.compile.cache_limit, self._context.report)

    def _verify(self, built: Sequence[CapturedBucket]) -> None:
        """Verify the buckets, and remove those that fail from the artifact."""
        artifact = self._context.artifact
        for bucket in built:
            verify_bucket(bucket, self._context)
            if artifact is not None and bucket.report.verification and bucket.compiled is None:
                artifact.drop(str(bucket.bucket))
                bucket.report.saved = False
