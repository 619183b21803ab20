"""Batches to launches, a step at a time: find the bucket, stage its inputs, launch once, read the ids when they are there.

Where no bucket serves a step, it runs eagerly on the same state and caches, and is counted by reason. A launch does not wait
for the device: the ids of a step are read on a stream of their own, while the next steps run.
"""

import os
import threading
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from compiled_llm.config.schema import Config, Sampler
from compiled_llm.errors import StrictError
from compiled_llm.models.discovery import AttentionLayer, continues_from_states
from compiled_llm.models.exported_model import ServedModel, model_itself
from compiled_llm.models.unchanged import Unchanged
from compiled_llm.report.report import Report
from compiled_llm.runtime.artifacts.artifact import Artifact
from compiled_llm.runtime.artifacts.cache import keeps, open_artifact, refuse_artifact
from compiled_llm.runtime.artifacts.fingerprint import Fingerprint, make_key
from compiled_llm.runtime.artifacts.model_source import ModelCode, identify
from compiled_llm.runtime.bucket_builder import BucketBuilder
from compiled_llm.runtime.bucket_tuning import Traffic
from compiled_llm.runtime.buckets import Bucket, Kind, make_buckets
from compiled_llm.runtime.capture.bucket_selector import BucketSelector
from compiled_llm.runtime.capture.lazy import LazyBuckets, between_steps
from compiled_llm.runtime.capture.warmup import CapturedBucket
from compiled_llm.runtime.compilation.compiler import Launch, trace
from compiled_llm.runtime.compilation.cuda_graph_trees import (
    graph_events,
    graph_pool,
    prepare_thread,
)
from compiled_llm.runtime.compilation.worker_pool import CompilePool
from compiled_llm.runtime.limits import Limits
from compiled_llm.runtime.memory.allocation import allocate
from compiled_llm.runtime.step.batch_inputs import DecodeBatch, PrefillBatch
from compiled_llm.runtime.step.readback import Readback, StepHandle
from compiled_llm.runtime.step.sampler import MAX_LOGPROBS, RowParams
from compiled_llm.runtime.step.sampler_state import SamplerState
from compiled_llm.runtime.step.step import choose
from compiled_llm.system.compiler_lock import COMPILER_LOCK, compiler_soon, run_eagerly
from passes.ops.top_logprobs import top_logprobs


class Logprobs(NamedTuple):
    """As `passes.ops.top_logprobs` gives them: [..., 1 + M] float32 and int64, the chosen token (its rank as id) first."""

    values: NDArray[np.float32]
    ids: NDArray[np.int64]


class ModelRunner:
    """Runs the steps of an attached model. It belongs to the thread that made it: graph trees are thread-local.

    Attributes:
        limits: the most sequences, tokens a step and tokens a sequence.
        memory: the step's buffers and the paged caches; page 0 of each group is its trash page, which no sequence may have.
        report: what was done so far and what it cost.
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
        self.model, self.config, self._just_loaded = model, config, just_loaded
        self._owner = os.getpid(), threading.get_ident()
        self._unchanged = Unchanged(
            model_itself(model), compiled=config.compile.dispatch != "eager"
        )
        prepare_thread()
        self.limits = Limits.resolve(config.limits, model.config, model.device)
        if self.limits.warning:
            report.warnings.append(self.limits.warning)
        prefill = config.buckets.prefill
        if not continues_from_states(model):
            report.warnings.append(
                f"{model.config.model_type} does not go on from its states with several tokens at once, so prompts are prefilled "
                f"one token a step, and limits.max_num_batched_tokens={self.limits.max_num_batched_tokens} is not used"
            )
            self.limits = replace(self.limits, max_num_batched_tokens=1)
            prefill = prefill and [1]
        largest: dict[Kind, int] = {
            "decode": self.limits.max_num_seqs,
            "prefill": self.limits.max_num_batched_tokens,
        }
        self._buckets: dict[Kind, list[Bucket]] = {
            "decode": self._make_buckets("decode", config.buckets.decode, largest["decode"]),
            "prefill": self._make_buckets("prefill", prefill, largest["prefill"]),
        }
        self._traffic = {
            kind: Traffic(limit=limit, buckets=self._sizes(kind)) for kind, limit in largest.items()
        }
        self.report = report
        with torch.no_grad():
            self.memory = allocate(model, layers, config, self.limits, report)
            if self.has_states and config.cache.prefix_caching:
                report.warnings.append(
                    f"{model.config.model_type} keeps states of its sequences, so prompts share no pages"
                )
            self._artifact = self._open_artifact() if keeps(config) else None
            maker = BucketBuilder(
                model, layers, self.memory, config, self.limits, self._artifact, report
            )
            buckets = [*self._buckets["prefill"], *self._buckets["decode"]]
            entries = (
                maker.make_all(buckets, progress=progress, pool=pool)
                if config.compile.dispatch != "eager"
                else None
            )
        self._lazy = LazyBuckets(maker.make_one)
        self._serving = BucketSelector(
            self._buckets, entries, report, strict=config.strict, ask=self._lazy.ask
        )
        self._readback = Readback(self.memory.state)
        report.graphs, report.pool_bytes = graph_pool(model.device)
        report.buckets = [entry.report for entry in entries or ()]
        report.graph_events = dict.fromkeys(graph_events(model.device), 0)

    @property
    def entries(self) -> dict[Bucket, CapturedBucket]:
        """The buckets, compiled or not."""
        return self._serving.entries

    @property
    def prefill_sizes(self) -> list[int]:
        """Tokens of the prefill buckets that serve, small to large."""
        return self._serving.sizes("prefill")

    @property
    def has_states(self) -> bool:
        """Whether sequences have states (see `models.states`): a prefill step then takes tokens of one of them alone."""
        return self.memory.states is not None

    @property
    def decodes_apart(self) -> bool:
        """Whether steps that only decode have buckets of their own, or run eagerly; else they run in prefill buckets."""
        eager = self.config.compile.dispatch == "eager"
        return (
            bool(self._buckets["decode"])
            or not self._buckets["prefill"]
            or eager
            or self.has_states
        )

    @property
    def capture_wanted(self) -> bool:
        """Whether steps have asked for a bucket that `compile.capture: lazy` has not made yet."""
        return self._lazy.wanted

    @property
    def owner_thread(self) -> int:
        """The identifier of the thread that made this."""
        return self._owner[1]

    @property
    def is_owner(self) -> bool:
        """Whether the current thread is the one that made this, in the same process."""
        return self._owner == (os.getpid(), threading.get_ident())

    def check_owner(self) -> None:
        """Raise a RuntimeError in any thread but the one that made this, and in a process forked from its own."""
        if os.getpid() != self._owner[0]:
            raise RuntimeError(
                f"this engine belongs to process {self._owner[0]}, and this is a fork of it: make another one here"
            )
        if not self.is_owner:
            raise RuntimeError(
                "this engine belongs to the thread that made it (CUDA graph trees are thread-local): call it from there"
            )

    def check_samplers(self, sampler: Sampler, *, scoring: bool) -> None:
        """Raise a ValueError if `strict` forbids the steps that a request with this sampler would take."""
        if self.config.strict:
            self._serving.check("prefill", "scoring" if scoring else sampler)
            if self.decodes_apart:
                self._serving.check("decode", sampler)

    def recover(self) -> None:
        """Make the next step possible after one was cut short anywhere: counters are read back from the device.

        Raises:
            RuntimeError: the device itself has failed.
        """
        if self.model.device.type == "cuda":
            torch.cuda.current_stream(
                self.model.device
            ).synchronize()  # the whole device may be in another engine's capture
        self.memory.state.arrivals.zero_()
        self._readback.resynchronize()

    def check_model(self) -> None:
        """Raise RuntimeError where the model is not what it was at the start, and compiled steps would not be what it computes."""
        self._unchanged.check()

    def maybe_capture(self, *, prompts_pending: bool, steps_in_flight: bool) -> bool:
        """Compile and capture the bucket in most demand, if one is due.

        Args:
            prompts_pending: whether prompts are to be computed; a capture is put off for a while.
            steps_in_flight: whether output of launched steps is still unread or unreported.

        Returns:
            True if a capture is due but `steps_in_flight` prevents it: read their output first.
        """
        if not self._lazy.due or (prompts_pending and not self._lazy.overdue):
            return False
        if steps_in_flight:
            return True
        self.capture_next()
        return False

    def capture_next(self) -> None:
        """Compile and capture what most steps have asked for; what all steps so far sampled must have been read.

        While another engine compiles, nothing is done, after a short wait: it may take minutes, and steps can go on without.
        """
        self.check_owner()
        self.check_model()
        with compiler_soon() as free:
            if not free:
                return
            with torch.no_grad(), between_steps(self.memory.state):
                self._serving.replace(self._lazy.capture_next())
        self.report.graphs, self.report.pool_bytes = graph_pool(self.model.device)

    def prefill(self, batch: PrefillBatch) -> StepHandle:
        """Cache the tokens, and sample for each sequence the one that follows; at most `max_num_batched_tokens` tokens."""
        self.check_owner()
        entry = self._serving.find("prefill", len(batch.ids), batch.sampler)
        asked = Bucket("prefill", len(batch.ids), batch.sampler)
        if entry is None:
            asked = self.memory.eager_bucket(asked, self.limits)
        self.memory.state.stage_prefill(batch, asked.size if entry is None else entry.bucket.size)
        return self._run(entry, asked)

    def decode(self, batch: DecodeBatch) -> StepHandle:
        """One more token for every row of the batch."""
        self.check_owner()
        entry = self._serving.find("decode", len(batch.rows), batch.sampler)
        if not batch.unchanged:
            self.memory.state.stage_decode(batch)
        return self._run(entry, Bucket("decode", len(batch.rows), batch.sampler))

    def tokens(self, ticket: StepHandle) -> NDArray[np.int64]:
        """[R + 1] the token that the step sampled in each of its rows, -1 where the scores were not finite; waits for the step."""
        return self._readback.tokens(ticket)

    def logprobs(self, ticket: StepHandle) -> Logprobs:
        """[R + 1, 1 + M] of a step of the full sampler, for the rows that wanted some; waits for the step."""
        return Logprobs(*self._readback.logprobs(ticket))

    def prompt_logprobs(self, num_tokens: int) -> Logprobs:
        """[T, 1 + M] of the last step, if that was a prefill of `num_tokens` with the scoring sampler; waits for it."""
        state = self.memory.state
        return Logprobs(
            state.prompt_logprobs[:num_tokens].cpu().numpy(),
            state.prompt_ids[:num_tokens].cpu().numpy(),
        )

    def set_extras(self, row: int, extras: SamplerState) -> None:
        """Write what few rows need."""
        self.check_owner()
        extras.write(self.memory.state, row)

    def logits(self, row: int) -> torch.Tensor:
        """[1, V] of the row's last step, a float32 copy, if that was of the full sampler."""
        return self.memory.state.logits[row : row + 1].to(torch.float32, copy=True)

    @torch.no_grad()
    def choose(self, row: int, logits: torch.Tensor) -> tuple[int, Logprobs]:
        """Sample the row's next token from these logits [1, V] instead, eagerly; -1 if they are not finite. Waits for it."""
        state = self.memory.state
        rows = torch.tensor([row], device=logits.device)
        params = RowParams.of(state.params[rows])
        sampled = choose(
            state,
            logits,
            rows,
            state.positions[rows],
            params,
            state.recent[rows],
            torch.ones_like(rows).bool(),
        )
        chosen = sampled.clamp(min=0)
        state.tokens[rows] = chosen
        values, ids = top_logprobs(state.logits[rows], chosen, params.logprobs, MAX_LOGPROBS)
        return int(sampled), Logprobs(values.cpu().numpy()[0], ids.cpu().numpy()[0])

    def key(self) -> Fingerprint:
        """What a compiled step of this engine depends on. Raises ValueError where that cannot be told."""
        return self._key(self._identify())

    def _key(self, code: ModelCode) -> Fingerprint:
        memory = self.memory
        buffers = [memory.state, memory.caches, *([memory.states] if memory.states else [])]
        return make_key(self.model, code.words, buffers, memory.groups, self.config, self.limits)

    def _identify(self) -> ModelCode:
        bucket = Bucket(
            "decode", self.limits.max_num_seqs, "greedy"
        )  # which need not be one of the config's
        step = self.memory.step(self.model, bucket)
        return identify(
            model_itself(self.model), lambda: trace(step), just_loaded=self._just_loaded
        )

    def _open_artifact(self) -> Artifact | None:
        with self.report.phase("identify the model", self.model.device):
            try:
                code = self._identify()
            except ValueError as error:
                refuse_artifact(self.report, f"what is compiled is not kept: {error}")
                return None
        return open_artifact(self.config, self._key(code), self.report, by_graph=code.by_graph)

    def _make_buckets(self, kind: Kind, sizes: list[int] | str, limit: int) -> list[Bucket]:
        config = self.config.buckets
        return make_buckets(
            kind, sizes, config.listed_samplers(), limit=limit, growth=config.growth
        )

    def _sizes(self, kind: Kind) -> list[int]:
        return sorted({bucket.size for bucket in self._buckets[kind]})

    def keep_traffic(self) -> None:
        """Add the sizes of the steps so far to what the artifact knows, for `compiled-llm buckets suggest`."""
        seen = {str(kind): traffic for kind, traffic in self._traffic.items() if traffic.seen}
        if self._artifact is not None and seen:
            with suppress(OSError):  # a full disk, say: nobody waits for this
                self._artifact.add_traffic(seen)

    def _run(self, entry: CapturedBucket | None, batch: Bucket) -> StepHandle:
        self._traffic[batch.kind].seen[batch.size] += 1
        with torch.no_grad():
            if entry is None or entry.compiled is None:
                run_eagerly(self.memory.step(self.model, batch))
                return self._readback.start()
            if entry.compiled.guarded:
                self._watch(entry.compiled.launch)
            else:  # it can do nothing else
                entry.compiled.launch()
        entry.report.replays += 1
        entry.report.padded += entry.bucket.size - batch.size
        return self._readback.start()

    def _watch(self, launch: Launch) -> None:
        """Launch, and count what the compiler did meanwhile that it should not have."""
        with COMPILER_LOCK:  # some of the counters are the process's
            before = graph_events(self.model.device)
            launch()
            after = graph_events(self.model.device)
        for name, count in after.items():
            self.report.graph_events[name] += count - before[name]
        if self.config.strict and after != before:
            raise StrictError(f"a step was not a mere replay: {self.report.graph_events}")
