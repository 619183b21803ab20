"""A bucket of an engine together with its compiled step."""

from dataclasses import dataclass

from compiled_llm.report.report import BucketReport
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.compilation.compiler import CompiledStep


@dataclass(slots=True, kw_only=True)
class CapturedBucket:
    """A bucket, its report, and its compiled step.

    Attributes:
        bucket: the static shape.
        report: what was compiled, at what cost; gives the reason where `compiled` is None.
        compiled: launches the step; None if the bucket is not (or not yet) usable.
    """

    bucket: Bucket
    report: BucketReport
    compiled: CompiledStep | None = None
