"""The prefill step of a model with recurrent states: the next tokens of one sequence.

A recurrent state passes from token to token, so tokens of other sequences cannot be in between.
"""

import torch
from torch import Tensor

from compiled_llm.models.attention import PagedAttention
from compiled_llm.runtime.step.batch_inputs import PrefillInputs
from compiled_llm.runtime.step.step import Step
from compiled_llm.sampling_params import MAX_LOGPROBS
from passes.ops.top_logprobs import top_logprobs


class RecurrentStep(Step):
    """Up to `size` tokens of the first sequence in `StepBuffers.prefill_inputs`.

    Padding is last in the inputs and first in the step, so that the recurrent state after the step
    is that after the sequence's last token.
    """

    def forward(self) -> None:
        state = self.state
        inputs = PrefillInputs.of(
            state.prefill_inputs, self.size, state.max_num_seqs, state.table_size
        )
        row, length, S = inputs.seq_rows[:1], inputs.seq_lens[:1], inputs.seq_rows.shape[0]
        tables = inputs.block_tables.view(state.num_groups, S, state.max_blocks)
        self._block_tables()[:, row] = tables[:, :1].int()
        state.params[row] = inputs.params.view(S, -1)[:1]
        count = inputs.query_start[1:2]
        padding = self.size - count
        indices = torch.arange(self.size, device=row.device)
        order = (indices - padding) % self.size
        self.current.attention = self._attention(inputs, order, padding)
        try:
            logits = self.call_model.sequence(
                inputs.ids[order],
                inputs.positions[order],
                row,
                start=length - count,
                mask=(indices >= padding).long(),
            )
        finally:
            self.current.attention = None
        if self.sampler == "scoring":
            values, top_ids = top_logprobs(
                logits[(indices + padding) % self.size],
                inputs.logprob_targets,
                inputs.num_logprobs,
                MAX_LOGPROBS,
            )
            state.prompt_logprobs[: self.size] = values
            state.prompt_logprob_ids[: self.size] = top_ids
        from_host = inputs.is_prompt[:1, None] > 0
        recent = torch.where(from_host, inputs.recent.view(S, -1)[:1], state.recent[row])
        self._sample(logits[-1:], row, length, recent, inputs.sample_mask[:1])
        state.positions[row] = length

    def _attention(self, inputs: PrefillInputs, order: Tensor, padding: Tensor) -> PagedAttention:
        """Describe two sequences: the padding, of length 0, and the row's."""
        state, zero = self.state, torch.zeros_like(padding)
        rows = torch.cat([zero + state.max_num_seqs, inputs.seq_rows[:1]])
        return PagedAttention(
            caches=self.caches,
            groups=self.groups,
            windows=self.windows,
            slots=self._slots(inputs.rows[order], inputs.positions[order]),
            block_tables=self._block_tables()[:, rows],
            query_start=torch.cat([zero, padding, zero + self.size]).int(),
            seq_lens=torch.cat([zero, inputs.seq_lens[:1]]).int(),
            split_counters=state.split_counters,
            # 1 would declare one query for each of the two sequences.
            max_query_len=max(self.size, 2),
        )
