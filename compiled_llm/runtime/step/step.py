"""One step of the model: ids in, next ids out, everything between in one traceable `forward()` without arguments.

All that a step reads and writes are buffers of `StepBuffers` and of the layer caches; only its bucket shapes the graph. A step
of any size also runs eagerly, on the same state and the same caches: that is the fallback.
"""

import torch
from torch import Tensor, nn

from compiled_llm.models.attention import CURRENT, LayerCache, PagedAttention
from compiled_llm.models.model_call import ModelCall
from compiled_llm.models.recurrent_state import RecurrentStates
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.step.batch_inputs import DecodeInputs, PrefillInputs
from compiled_llm.runtime.step.buffers import RING, StepBuffers
from compiled_llm.runtime.step.sampler import (
    History,
    RowParams,
    sample_full,
    sample_greedy,
    sample_random,
)
from compiled_llm.sampling_params import MAX_LOGPROBS
from passes.ops.top_logprobs import top_logprobs


class Step(nn.Module):
    """What both kinds of step share: the model, its caches (a group number and a window for each) and the state."""

    def __init__(
        self,
        model: nn.Module,
        caches: nn.ModuleList,
        groups: tuple[int, ...],
        windows: tuple[int, ...],
        state: StepBuffers,
        states: RecurrentStates | None,
        bucket: Bucket,
    ) -> None:
        super().__init__()
        self.model, self.caches, self.groups, self.windows, self.state = (
            model,
            caches,
            groups,
            windows,
            state,
        )
        self.states, self.call_model = states, ModelCall(model, states)
        self.size, self.sampler = bucket.size, bucket.sampler
        self.current = CURRENT
        self.block_size = next(
            (cache.k.shape[1] for cache in caches if isinstance(cache, LayerCache)), 1
        )

    def _tables(self) -> Tensor:
        """The block table, [G, R + 1, N]."""
        state = self.state
        return state.block_table.view(state.num_groups, state.max_num_seqs + 1, state.max_blocks)

    def _slots(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Where in the caches of each group the tokens at these positions of these rows live, [G, T]."""
        pages = self._tables()[:, rows, positions // self.block_size]
        return pages.long() * self.block_size + positions % self.block_size

    def _logits(
        self,
        ids: Tensor,
        positions: Tensor,
        rows: Tensor,
        attention: PagedAttention,
        wanted: Tensor | None,
    ) -> Tensor:
        """Logits [T, V] of the tokens, or [S, V] of those at the indices `wanted`."""
        self.current.attention = attention
        try:
            return self.call_model(ids, positions, rows, wanted)
        finally:
            self.current.attention = None

    def _sample(
        self,
        logits: Tensor,
        rows: Tensor,
        positions: Tensor,
        recent: Tensor | None,
        samples: Tensor,
    ) -> None:
        """Choose the ids at these positions of these rows: their next tokens, and the step's output."""
        state = self.state
        params = RowParams.of(state.params[rows])
        slot = (state.step % RING).expand_as(rows)
        if self.sampler == "greedy":
            sampled = sample_greedy(logits)
        elif self.sampler == "random":
            sampled = sample_random(logits, params.temperature, params.seed, positions)
        else:
            recent = state.recent[rows] if recent is None else recent
            state.logits[rows] = logits
            sampled = choose(
                state, logits, rows, positions, params, recent, samples.bool() & ~params.external
            )
            wanted = torch.where(samples.bool(), params.logprobs, -1)
            found = top_logprobs(logits, sampled.clamp(min=0), wanted, MAX_LOGPROBS)
            state.ring_logprobs[slot, rows], state.ring_ids[slot, rows] = found
        state.tokens[rows] = sampled.clamp(
            min=0
        )  # the next step may run before the host reads a -1
        state.ring_tokens[slot, rows] = sampled
        state.step.add_(1)


def choose(
    state: StepBuffers,
    logits: Tensor,
    rows: Tensor,
    positions: Tensor,
    params: RowParams,
    recent: Tensor,
    counts: Tensor,
) -> Tensor:
    """The full sampler on the rows' state; where `counts` [S] bool, the chosen ids enter the counts and the recent tokens."""
    history = History(state.bias[rows], state.counts[rows], state.bad_words[rows], recent)
    sampled = sample_full(logits, params, history, positions)
    state.counts.index_put_(
        (rows, sampled.clamp(min=0)), 2 * (counts & params.counted).int(), accumulate=True
    )
    state.recent[rows] = torch.where(
        counts[:, None], torch.cat([recent[:, 1:], sampled[:, None]], 1), recent
    )
    return sampled


class DecodeStep(Step):
    """One token for each of up to `size` rows; advances their tokens and positions."""

    def forward(self) -> None:
        state = self.state
        inputs = DecodeInputs.of(state.decode, self.size, state.max_num_seqs)
        rows = inputs.rows
        state.block_table[inputs.patch_index] = inputs.patch_page.int()
        positions = state.positions[rows]
        live = rows < state.max_num_seqs
        lengths = torch.where(live, positions + 1, 0)
        attention = PagedAttention(
            caches=self.caches,
            groups=self.groups,
            windows=self.windows,
            slots=self._slots(rows, positions),
            block_tables=self._tables()[:, rows],
            query_start=state.ordinals[: self.size + 1],
            seq_lens=lengths.int(),
            split_counters=state.split_counters,
            max_query_len=1,
        )
        logits = self._logits(state.tokens[rows], positions, rows, attention, None)
        self._sample(logits, rows, positions + 1, None, lengths)
        if (
            rows.device.type == "cpu"
        ):  # Inductor's C++ gets a read and a write by one index in a kernel wrong (pytorch#181621)
            state.positions.index_put_((rows,), live.long(), accumulate=True)
        else:  # where accumulating would sort
            state.positions[rows] = lengths


class PrefillStep(Step):
    """`size` tokens of any rows, as `StepBuffers.prefill` lays them out; samples after the last one of each row."""

    def forward(self) -> None:
        state = self.state
        inputs = PrefillInputs.of(state.prefill, self.size, state.max_num_seqs, state.table_size)
        seqs, S = inputs.seq_rows, inputs.seq_rows.shape[0]
        self._tables()[:, seqs] = inputs.tables.view(state.num_groups, S, state.max_blocks).int()
        state.params[seqs] = inputs.params.view(S, -1)
        ids = torch.where(inputs.ids < 0, state.tokens[inputs.rows], inputs.ids)
        attention = PagedAttention(
            caches=self.caches,
            groups=self.groups,
            windows=self.windows,
            slots=self._slots(inputs.rows, inputs.positions),
            block_tables=self._tables()[:, seqs],
            query_start=inputs.query_start.int(),
            seq_lens=inputs.seq_lens.int(),
            split_counters=state.split_counters,
            max_query_len=self.size,
        )
        last = (inputs.query_start[1:] - 1).clamp(min=0)
        if self.sampler == "scoring":
            every = self._logits(ids, inputs.positions, inputs.rows, attention, None)
            scored = top_logprobs(every, inputs.targets, inputs.scores, MAX_LOGPROBS)
            state.prompt_logprobs[: self.size], state.prompt_ids[: self.size] = scored
            logits = every[last]
        else:
            logits = self._logits(ids, inputs.positions, inputs.rows, attention, last)
        recent = torch.where(
            inputs.fresh[:, None] > 0, inputs.recent.view(S, -1), state.recent[seqs]
        )
        self._sample(logits, seqs, inputs.seq_lens, recent, inputs.samples)
        state.positions[seqs] = inputs.seq_lens
