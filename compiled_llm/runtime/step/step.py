"""One step of the model in one traceable `forward()` without arguments: token ids in, next ids out.

A step reads and writes `StepBuffers` and the layer caches alone. Only its bucket shapes the graph.
A step of any size also runs eagerly on the same buffers and caches; this is the fallback.

Shape suffixes, as in `buffers`: R rows, G groups of layers, N pages of a row, S sequences,
T tokens, V tokens in the vocabulary.
"""

import torch
from torch import Tensor, nn

from compiled_llm.models.attention import CURRENT, LayerCache, PagedAttention
from compiled_llm.models.model_call import ModelCall
from compiled_llm.models.recurrent_state import RecurrentStates
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.step.batch_inputs import DecodeInputs, PrefillInputs
from compiled_llm.runtime.step.buffers import RING_SIZE, StepBuffers
from compiled_llm.runtime.step.sampler import (
    LogitsProcessorState,
    SamplingTensors,
    sample_full,
    sample_greedy,
    sample_random,
)
from compiled_llm.sampling_params import MAX_LOGPROBS
from passes.ops.top_logprobs import top_logprobs


class Step(nn.Module):
    """Base class of the steps.

    Args:
        model: the traced model.
        caches: the cache of each attention layer.
        groups: the group number of each of these layers.
        windows: the encoded reach of each of them (see `AttentionReach.encode`).
        state: inputs and outputs.
        states: recurrent states of the rows, or None for a model without any.
        bucket: the static shape and the sampler.
    """

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
        self.model = model
        self.caches = caches
        self.groups = groups
        self.windows = windows
        self.state = state
        self.states = states
        self.call_model = ModelCall(model, states)
        self.size = bucket.size
        self.sampler = bucket.sampler
        # Thread-local: each engine's thread has an attention context of its own.
        self.current = CURRENT
        self.block_size = next(
            (cache.k.shape[1] for cache in caches if isinstance(cache, LayerCache)), 1
        )

    def _block_tables(self) -> Tensor:
        """Return the block tables as a view, [G, R + 1, N] int32."""
        state = self.state
        return state.block_table.view(state.num_groups, state.max_num_seqs + 1, state.max_blocks)

    def _slots(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Return the cache slots of the tokens at these positions of these rows, [G, T] int64."""
        pages = self._block_tables()[:, rows, positions // self.block_size]
        return pages.long() * self.block_size + positions % self.block_size

    def _logits(
        self,
        ids: Tensor,
        positions: Tensor,
        rows: Tensor,
        attention: PagedAttention,
        indices: Tensor | None,
    ) -> Tensor:
        """Return the logits [T, V] of all tokens, or [S, V] of those at `indices`."""
        self.current.attention = attention
        try:
            return self.call_model(ids, positions, rows, indices)
        finally:
            self.current.attention = None

    def _sample(
        self,
        logits: Tensor,
        rows: Tensor,
        positions: Tensor,
        recent: Tensor | None,
        sample_mask: Tensor,
    ) -> None:
        """Sample the ids at these positions of these rows, and write them to the rows and the ring.

        `recent` replaces the rows' recent tokens. Where `sample_mask` is 0, the sampled id is not
        counted and has no logprobs.
        """
        state = self.state
        params = SamplingTensors.unpack(state.params[rows])
        slot = (state.step % RING_SIZE).expand_as(rows)
        if self.sampler == "greedy":
            sampled = sample_greedy(logits)
        elif self.sampler == "random":
            sampled = sample_random(logits, params.temperature, params.seed, positions)
        else:
            recent = state.recent[rows] if recent is None else recent
            state.logits[rows] = logits
            counted = sample_mask.bool() & ~params.host_sampled
            sampled = sample_and_update(state, logits, rows, positions, params, recent, counted)
            num_logprobs = torch.where(sample_mask.bool(), params.logprobs, -1)
            state.ring_logprobs[slot, rows], state.ring_logprob_ids[slot, rows] = top_logprobs(
                logits, sampled.clamp(min=0), num_logprobs, MAX_LOGPROBS
            )
        # The next step may run before the host reads a -1, and embeds these ids.
        state.tokens[rows] = sampled.clamp(min=0)
        state.ring_tokens[slot, rows] = sampled
        state.step.add_(1)


def sample_and_update(
    state: StepBuffers,
    logits: Tensor,
    rows: Tensor,
    positions: Tensor,
    params: SamplingTensors,
    recent: Tensor,
    counted: Tensor,
) -> Tensor:
    """Sample with the `full` sampler, and update the rows' token counts and recent tokens.

    Args:
        state: holds the rows' state; `counts` and `recent` are updated.
        logits: [S, V].
        rows, positions: [S] int64, of the tokens to sample.
        params: of the rows.
        recent: [S, RECENT] int64, the tokens before these.
        counted: [S] bool, whether the sampled token enters the row's counts and recent tokens.

    Returns:
        [S] int64 sampled ids, -1 where no logit is finite.
    """
    processors = LogitsProcessorState(
        state.bias[rows], state.counts[rows], state.bad_words[rows], recent
    )
    sampled = sample_full(logits, params, processors, positions)
    state.counts.index_put_(
        (rows, sampled.clamp(min=0)), 2 * (counted & params.counted).int(), accumulate=True
    )
    shifted = torch.cat([recent[:, 1:], sampled[:, None]], 1)
    state.recent[rows] = torch.where(counted[:, None], shifted, recent)
    return sampled


class DecodeStep(Step):
    """One token for each of up to `size` rows; advances their tokens and positions."""

    def forward(self) -> None:
        state = self.state
        inputs = DecodeInputs.of(state.decode_inputs, self.size, state.max_num_seqs)
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
            block_tables=self._block_tables()[:, rows],
            query_start=state.decode_query_start[: self.size + 1],
            seq_lens=lengths.int(),
            split_counters=state.split_counters,
            max_query_len=1,
        )
        logits = self._logits(state.tokens[rows], positions, rows, attention, None)
        self._sample(logits, rows, positions + 1, None, lengths)
        if rows.device.type == "cpu":
            # Inductor's C++ backend generates wrong code for a kernel that reads and writes a
            # buffer at the same index (pytorch#181621).
            state.positions.index_put_((rows,), live.long(), accumulate=True)
        else:
            # On a GPU, accumulating would sort the indices first.
            state.positions[rows] = lengths


class PrefillStep(Step):
    """`size` tokens of any rows (see `PrefillInputs`); samples after the last token of each row."""

    def forward(self) -> None:
        state = self.state
        inputs = PrefillInputs.of(
            state.prefill_inputs, self.size, state.max_num_seqs, state.table_size
        )
        seqs, S = inputs.seq_rows, inputs.seq_rows.shape[0]
        tables = inputs.block_tables.view(state.num_groups, S, state.max_blocks)
        self._block_tables()[:, seqs] = tables.int()
        state.params[seqs] = inputs.params.view(S, -1)
        ids = torch.where(inputs.ids < 0, state.tokens[inputs.rows], inputs.ids)
        attention = PagedAttention(
            caches=self.caches,
            groups=self.groups,
            windows=self.windows,
            slots=self._slots(inputs.rows, inputs.positions),
            block_tables=self._block_tables()[:, seqs],
            query_start=inputs.query_start.int(),
            seq_lens=inputs.seq_lens.int(),
            split_counters=state.split_counters,
            max_query_len=self.size,
        )
        last = (inputs.query_start[1:] - 1).clamp(min=0)
        if self.sampler == "scoring":
            all_logits = self._logits(ids, inputs.positions, inputs.rows, attention, None)
            values, top_ids = top_logprobs(
                all_logits, inputs.logprob_targets, inputs.num_logprobs, MAX_LOGPROBS
            )
            state.prompt_logprobs[: self.size] = values
            state.prompt_logprob_ids[: self.size] = top_ids
            logits = all_logits[last]
        else:
            logits = self._logits(ids, inputs.positions, inputs.rows, attention, last)
        from_host = inputs.is_prompt[:, None] > 0
        recent = torch.where(from_host, inputs.recent.view(S, -1), state.recent[seqs])
        self._sample(logits, seqs, inputs.seq_lens, recent, inputs.sample_mask)
        state.positions[seqs] = inputs.seq_lens
