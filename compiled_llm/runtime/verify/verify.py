"""Compares each bucket with the same step run eagerly, without padding, on the same state.

In the eager step each custom op runs its plain PyTorch reference, on any device, so that kernels
are not compared with themselves. One batch has a sequence as long as `limits.max_model_len` allows,
since a kernel may be right for short sequences alone. What is compared, and how large a difference
rounding may make, is in `comparison`.

Whatever a bucket writes meanwhile, the state and the pages are restored afterwards.
"""

from collections.abc import Callable

import torch

from compiled_llm.config.schema import Sampler
from compiled_llm.errors import StrictError
from compiled_llm.models.exported_model import ServedModel
from compiled_llm.report.report import BucketState, Verification
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.build_context import BuildContext
from compiled_llm.runtime.capture.captured_bucket import CapturedBucket
from compiled_llm.runtime.compilation.compiler import release
from compiled_llm.runtime.memory.allocation import Memory
from compiled_llm.runtime.step.batch_inputs import RECENT
from compiled_llm.runtime.step.sampler import LogitsProcessorState
from compiled_llm.runtime.verify.comparison import Comparison
from compiled_llm.runtime.verify.random_batches import BatchShape, RandomBatch, make_random_batch
from compiled_llm.runtime.verify.snapshot import preserve, take_snapshot
from compiled_llm.runtime.verify.staging import stage_random_batch
from compiled_llm.system.compiler_lock import run_eagerly
from passes.ops.library import use_references

# The largest difference that rounding may make, in standard deviations.
ALLOWED = {torch.float32: 0.01, torch.float16: 0.25, torch.bfloat16: 1.0}
# The share of tokens that may differ by more, with experts and in 16 bits.
MISROUTED = 0.25
_FIRST_SHAPES: tuple[BatchShape, ...] = ("full", "long")  # later batches are of random sizes
_MIN_BATCHES = 4
_MIN_TOKENS = 16


def verify_bucket(entry: CapturedBucket, context: BuildContext) -> None:
    """Verify a compiled bucket, and set `compiled` to None if it fails.

    Raises:
        StrictError: the bucket fails and the config is strict.
    """
    if entry.compiled is None:
        return
    report = entry.report
    report.verification = verify(entry.bucket, entry.compiled.launch, context)
    failure = report.verification.failure
    if failure is None:
        return
    release(entry.compiled, context.device)
    entry.compiled = None
    report.state = BucketState.FAILED
    report.failure = f"verification: {failure}"
    if context.config.strict:
        raise StrictError(f"bucket {entry.bucket} does not match eager: {failure}")


@torch.no_grad()
def verify(bucket: Bucket, launch: Callable[[], object], context: BuildContext) -> Verification:
    """Compare a bucket with eager on random batches of different lengths and block tables.

    Args:
        bucket: the shape.
        launch: runs its step once on the staged inputs.
        context: of the engine.
    """
    dtype = context.model.dtype
    comparison = Comparison(allowed=ALLOWED[dtype])
    while comparison.num_batches < _MIN_BATCHES or comparison.num_tokens < _MIN_TOKENS:
        number = comparison.num_batches
        shape = _FIRST_SHAPES[number] if number < len(_FIRST_SHAPES) else "random"
        batch = make_random_batch(bucket, context.memory, context.limits, seed=number, shape=shape)
        _run_batch(batch, comparison, bucket, launch, context)
    misrouted = dtype != torch.float32 and _has_experts(context.model)
    return comparison.result(allowed_share=MISROUTED if misrouted else 0.0)


def _run_batch(
    batch: RandomBatch,
    comparison: Comparison,
    bucket: Bucket,
    launch: Callable[[], object],
    context: BuildContext,
) -> None:
    """Run one batch in the bucket and eagerly, and compare the two."""
    memory = context.memory
    # These samplers store their logits, with which the bucket is compared.
    sampler: Sampler = "scoring" if bucket.sampler == "scoring" else "full"
    exact = Bucket(bucket.kind, int(batch.num_new.sum()), sampler)
    reference = memory.eager_bucket(exact, context.limits)
    with preserve(memory, batch):
        stage_random_batch(batch, memory, bucket.size)
        launch()
        actual = take_snapshot(batch, memory, bucket)
        stage_random_batch(batch, memory, reference.size)
        processors = _logits_processors(batch, memory)
        with use_references():
            run_eagerly(memory.step(context.model, reference))
            expected = take_snapshot(batch, memory, reference)
            comparison.add(actual, expected, batch, processors)


def _logits_processors(batch: RandomBatch, memory: Memory) -> LogitsProcessorState:
    """Copy the rows' state before the step."""
    state = memory.state
    rows = torch.from_numpy(batch.rows).to(state.tokens.device)
    recent = torch.full((len(batch.rows), RECENT), -1, device=rows.device)
    return LogitsProcessorState(state.bias[rows], state.counts[rows], state.bad_words[rows], recent)


def _has_experts(model: ServedModel) -> bool:
    return any("experts" in name for name in model.config.get_text_config().to_dict())
