"""Runs steps: selects a bucket, stages the inputs, launches once, and reads the outputs later.

A step that no bucket serves runs eagerly on the same buffers and caches and is counted by its
reason. A launch does not wait for the device: the outputs of a step are copied on a stream of their
own while the next steps run.

Shape suffixes: R rows (the most sequences at once); V tokens in the vocabulary; M top logprobs.
"""

from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from compiled_llm.config.schema import Config, Sampler
from compiled_llm.errors import StrictError
from compiled_llm.models.discovery import AttentionLayer
from compiled_llm.models.exported_model import ServedModel, underlying_model
from compiled_llm.models.model_guard import ModelGuard
from compiled_llm.report.report import Report
from compiled_llm.runtime.artifact_setup import engine_fingerprint
from compiled_llm.runtime.artifacts.fingerprint import Fingerprint
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.build_context import BuildContext
from compiled_llm.runtime.capture.captured_bucket import CapturedBucket
from compiled_llm.runtime.capture.lazy import preserve_step_inputs
from compiled_llm.runtime.compilation.compiler import Launch
from compiled_llm.runtime.compilation.cuda_graph_trees import (
    graph_events,
    graph_pool,
    prepare_thread,
)
from compiled_llm.runtime.compilation.worker_pool import CompilePool
from compiled_llm.runtime.runner_setup import set_up_runner
from compiled_llm.runtime.step import host_sampling
from compiled_llm.runtime.step.batch_inputs import DecodeBatch, PrefillBatch
from compiled_llm.runtime.step.readback import Logprobs, Readback, StepHandle
from compiled_llm.runtime.step.sampler_state import SamplerState
from compiled_llm.runtime.thread_owner import ThreadOwner
from compiled_llm.system.compiler_lock import COMPILER_LOCK, run_eagerly, try_compiler_lock


class ModelRunner:
    """Runs the steps of one model, in the thread that creates it.

    Args:
        model: the traced model; its attention is routed to the paged cache.
        layers: its attention layers.
        config: of the engine.
        report: receives phases, buckets, counts and warnings.
        progress: whether to show a progress bar.
        pool: processes that compile buckets, if they were started early.
        just_loaded: whether nothing has changed the model since transformers loaded it.

    Attributes:
        limits: sequences and tokens of a step, and tokens of a sequence.
        memory: the step's buffers and the paged caches. Page 0 of each group is its trash page.
        context: what the buckets are built from.
        has_states: whether the model has recurrent states. A prefill step then serves one sequence.
        separate_decode: whether steps that only decode run in decode buckets or eagerly, not in
            prefill buckets.
    """

    def __init__(
        self,
        model: ServedModel,
        layers: list[AttentionLayer],
        config: Config,
        report: Report,
        *,
        progress: bool,
        pool: CompilePool | None = None,
        just_loaded: bool = False,
    ) -> None:
        self.model = model
        self.config = config
        self.report = report
        self._owner = ThreadOwner()
        self._guard = ModelGuard(
            underlying_model(model), compiled=config.compile.dispatch != "eager"
        )
        prepare_thread()
        setup = set_up_runner(
            model, layers, config, report, progress=progress, pool=pool, just_loaded=just_loaded
        )
        self.context = setup.context
        self.limits = setup.context.limits
        self.memory = setup.context.memory
        self.has_states = self.memory.states is not None
        self.separate_decode = setup.separate_decode
        self._selector = setup.selector
        self._lazy = setup.lazy
        self._traffic = setup.traffic
        self._readback = Readback(self.memory.state)

    @property
    def captured_buckets(self) -> dict[Bucket, CapturedBucket]:
        """All buckets, whether usable or not."""
        return self._selector.captured_buckets

    @property
    def prefill_sizes(self) -> list[int]:
        """Tokens of the usable prefill buckets, ascending."""
        return self._selector.usable_sizes("prefill")

    @property
    def capture_pending(self) -> bool:
        """Whether steps have needed a bucket that `compile.capture: lazy` has not built yet."""
        return self._lazy.has_demand

    @property
    def owner_thread(self) -> int:
        """Identifier of the thread that created the runner."""
        return self._owner.thread

    @property
    def is_owner(self) -> bool:
        """Whether this is called in the thread and process that created the runner."""
        return self._owner.is_current

    def check_owner(self) -> None:
        """Raise a RuntimeError in another thread or in a forked process."""
        self._owner.check()

    def check_model(self) -> None:
        """Raise a RuntimeError if the model was changed so that compiled steps are wrong."""
        self._guard.check()

    def check_samplers(self, sampler: Sampler, *, scoring: bool) -> None:
        """Raise a ValueError if `strict` forbids the steps of a request with this sampler."""
        if self.config.strict:
            self._selector.check_sampler("prefill", "scoring" if scoring else sampler)
            if self.separate_decode:
                self._selector.check_sampler("decode", sampler)

    def recover(self) -> None:
        """Make a next step possible after an interrupted one; a failed device is a RuntimeError."""
        if self.model.device.type == "cuda":
            # This stream alone: another engine may be capturing, and must not be synchronized.
            torch.cuda.current_stream(self.model.device).synchronize()
        self.memory.state.split_counters.zero_()
        self._readback.resynchronize()

    def maybe_capture(self, *, prompts_pending: bool, steps_in_flight: bool) -> bool:
        """Build the bucket in most demand if it is due. Call this between two steps.

        Args:
            prompts_pending: prompts wait or are prefilled; they defer a capture until overdue.
            steps_in_flight: outputs are not read or delivered yet; they come before a capture.

        Returns:
            True if a due capture waits for `steps_in_flight`: read and deliver, then call again.
        """
        if not self._lazy.is_due or (prompts_pending and not self._lazy.is_overdue):
            return False
        if steps_in_flight:
            return True
        self.capture_next()
        return False

    def capture_next(self) -> None:
        """Build the bucket in most demand, unless another engine compiles now.

        The outputs of all launched steps must have been read.
        """
        self.check_owner()
        self.check_model()
        with try_compiler_lock() as free:
            if not free:
                return
            with torch.no_grad(), preserve_step_inputs(self.memory.state):
                self._selector.replace(self._lazy.build_next())
        counters = self.report.counters
        counters.graphs, counters.pool_bytes = graph_pool(self.model.device)

    def prefill(self, batch: PrefillBatch) -> StepHandle:
        """Launch a step that caches the batch's tokens and samples the next token of each row."""
        self.check_owner()
        entry = self._selector.select("prefill", len(batch.ids), batch.sampler)
        exact = Bucket("prefill", len(batch.ids), batch.sampler)
        if entry is None:
            exact = self.memory.eager_bucket(exact, self.limits)
        self.memory.state.stage_prefill(batch, exact.size if entry is None else entry.bucket.size)
        return self._launch(entry, exact)

    def decode(self, batch: DecodeBatch) -> StepHandle:
        """Launch a step that samples one more token for each row of the batch."""
        self.check_owner()
        entry = self._selector.select("decode", len(batch.rows), batch.sampler)
        if not batch.unchanged:
            self.memory.state.stage_decode(batch)
        return self._launch(entry, Bucket("decode", len(batch.rows), batch.sampler))

    def tokens(self, handle: StepHandle) -> NDArray[np.int64]:
        """Return the sampled tokens [R + 1] int64, -1 for non-finite logits; waits for the step."""
        return self._readback.tokens(handle)

    def logprobs(self, handle: StepHandle) -> Logprobs:
        """Return the logprobs [R + 1, 1 + M] of a step with the `full` sampler; waits for it."""
        return self._readback.logprobs(handle)

    def prompt_logprobs(self, num_tokens: int) -> Logprobs:
        """See `host_sampling.read_prompt_logprobs`."""
        return host_sampling.read_prompt_logprobs(self.memory.state, num_tokens)

    def logits(self, row: int) -> torch.Tensor:
        """See `host_sampling.read_logits`."""
        return host_sampling.read_logits(self.memory.state, row)

    def sample_from_logits(self, row: int, logits: torch.Tensor) -> tuple[int, Logprobs]:
        """See `host_sampling.sample_from_logits`."""
        return host_sampling.sample_from_logits(self.memory.state, row, logits)

    def write_sampler_state(self, row: int, state: SamplerState) -> None:
        """Write the bias, token counts and bad words of a row."""
        self.check_owner()
        state.write(self.memory.state, row)

    def fingerprint(self) -> Fingerprint:
        """See `engine_fingerprint`."""
        return engine_fingerprint(self.context)

    def save_traffic(self) -> None:
        """Add the sizes of the steps so far to the artifact, for `compiled-llm buckets suggest`."""
        seen = {str(kind): traffic for kind, traffic in self._traffic.items() if traffic.seen}
        if self.context.artifact is not None and seen:
            with suppress(OSError):  # such as a full disk; the counts are not essential
                self.context.artifact.add_traffic(seen)

    def _launch(self, entry: CapturedBucket | None, batch: Bucket) -> StepHandle:
        self._traffic[batch.kind].seen[batch.size] += 1
        with torch.no_grad():
            if entry is None or entry.compiled is None:
                run_eagerly(self.memory.step(self.model, batch))
                return self._readback.start()
            if entry.compiled.guarded:
                _launch_guarded(entry.compiled.launch, self.context)
            else:  # a replay cannot compile or record, so there is nothing to count
                entry.compiled.launch()
        entry.report.replays += 1
        entry.report.padded += entry.bucket.size - batch.size
        return self._readback.start()


def _launch_guarded(launch: Launch, context: BuildContext) -> None:
    """Launch, and count the compiler's unexpected events; with `strict` they are an error."""
    with COMPILER_LOCK:  # some counters are shared by the process
        before = graph_events(context.device)
        launch()
        after = graph_events(context.device)
    events = context.report.counters.graph_events
    for name, count in after.items():
        events[name] += count - before[name]
    if context.config.strict and after != before:
        raise StrictError(
            f"a step did more than replay its graph: {events}; set strict=false to allow this"
        )
