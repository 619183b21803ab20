"""Batches to launches, a step at a time: find the bucket, fill its inputs, launch once.

Where no bucket serves a step, it runs eagerly on the same state and caches, and is counted by reason.
"""

import threading
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from compiled_llm.config import Config
from compiled_llm.models.discovery import AttentionLayer
from compiled_llm.runtime.buckets import Bucket, Kind, make_buckets, match
from compiled_llm.runtime.dispatch import Launch, graph_events, graph_pool
from compiled_llm.runtime.limits import Limits
from compiled_llm.runtime.report import Report
from compiled_llm.runtime.state import PrefillChunk
from compiled_llm.runtime.warmup import STEPS, Entry, StrictError, allocate, compile_buckets


class Runtime:
    """Runs the steps of an attached model. It belongs to the thread that made it: graph trees are thread-local.

    Attributes:
        limits: the most sequences, tokens a step and tokens a sequence.
        memory: the step's buffers and the paged caches; page 0 is the trash page, which no sequence may have.
        report: what was done so far and what it cost.
    """

    def __init__(
        self, model: PreTrainedModel, layers: list[AttentionLayer], config: Config, report: Report, *, progress: bool
    ) -> None:
        self.model, self.config = model, config
        self._thread = threading.get_ident()
        self.limits = Limits.resolve(config.limits, model.config, model.device)
        self._buckets: dict[Kind, list[Bucket]] = {
            "decode": self._make_buckets("decode", config.buckets.decode, self.limits.max_num_seqs),
            "prefill": self._make_buckets("prefill", config.buckets.prefill, self.limits.max_num_batched_tokens),
        }
        self._entries: dict[Bucket, Entry] = {}
        with torch.no_grad():
            self.memory = allocate(model, layers, config, self.limits, report)
            if config.compile.dispatch != "eager":
                with report.phase("compile and capture", model.device):
                    buckets = [*self._buckets["prefill"], *self._buckets["decode"]]
                    entries = compile_buckets(buckets, model, layers, self.memory, config, progress=progress)
                self._entries = {entry.bucket: entry for entry in entries}
        report.graphs, report.pool_bytes = graph_pool(model.device)
        report.buckets = [entry.report for entry in self._entries.values()]
        report.graph_events = dict.fromkeys(graph_events(model.device), 0)
        self.report = report

    def join(self, row: int, *, pages: Sequence[int], temperature: float, seed: int) -> None:
        """A sequence takes a row, with pages for all the tokens it will ever have."""
        self._check_thread()
        self.memory.state.join(row, pages=pages, temperature=temperature, seed=seed)

    def prefill(self, chunks: Sequence[PrefillChunk]) -> None:
        """Cache the chunks' tokens, and sample for each row the token that follows its chunk.

        At most one chunk a row, `max_num_batched_tokens` tokens in all.
        """
        num_tokens = sum(len(chunk.tokens) for chunk in chunks)
        entry = self._find("prefill", num_tokens)
        size = entry.bucket.size if entry is not None else num_tokens
        self.memory.state.stage_prefill(chunks, size)
        self._run(entry, Bucket("prefill", num_tokens))

    def activate(self, rows: Sequence[int]) -> None:
        """Decode steps serve these rows from now on."""
        self._check_thread()
        self.memory.state.activate(rows)

    def decode(self, num_rows: int) -> None:
        """One more token for every active row among the first `num_rows`."""
        self._run(self._find("decode", num_rows), Bucket("decode", num_rows))

    def tokens(self, num_rows: int) -> list[int]:
        """The token last sampled in each of the first rows; waits for the device."""
        self._check_thread()
        tokens: list[int] = self.memory.state.tokens[:num_rows].tolist()
        return tokens

    def leave(self, rows: Sequence[int]) -> None:
        """These rows become padding; their pages may serve others."""
        self._check_thread()
        self.memory.state.leave(rows)

    def _make_buckets(self, kind: Kind, sizes: list[int] | str, limit: int) -> list[Bucket]:
        return make_buckets(kind, sizes, limit=limit, growth=self.config.buckets.growth)

    def _find(self, kind: Kind, size: int) -> Entry | None:
        """The entry that serves a batch of `size`, or None, counted by its reason."""
        self._check_thread()
        bucket = match(self._buckets[kind], size)
        entry = self._entries.get(bucket) if bucket is not None else None
        if entry is not None and entry.compiled is not None:
            return entry
        if self.config.compile.dispatch == "eager":
            reason = "compile.dispatch is eager"
        elif bucket is None:
            reason = f"no {kind} bucket holds {size}"
        else:
            reason = f"{bucket} failed: {self._entries[bucket].report.failure}"
        self.report.fallbacks[reason] += 1
        if self.config.strict:
            raise StrictError(f"a step would run eagerly: {reason}")
        return None

    def _run(self, entry: Entry | None, batch: Bucket) -> None:
        with torch.no_grad():
            if entry is None or entry.compiled is None:
                STEPS[batch.kind](self.model, self.memory.caches, self.memory.state, size=batch.size)()
                return
            if entry.compiled.graph:  # a replay can do nothing but replay
                entry.compiled.launch()
            else:
                self._watch(entry.compiled.launch)
        entry.report.replays += 1
        entry.report.padded += entry.bucket.size - batch.size

    def _watch(self, launch: Launch) -> None:
        """Launch, and count what the compiler did meanwhile that it should not have."""
        before = graph_events(self.model.device)
        launch()
        after = graph_events(self.model.device)
        for name, count in after.items():
            self.report.graph_events[name] += count - before[name]
        if self.config.strict and after != before:
            raise StrictError(f"a step was not a mere replay: {self.report.graph_events}")

    def _check_thread(self) -> None:
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                "this engine belongs to the thread that made it (CUDA graph trees are thread-local): call it from there"
            )
