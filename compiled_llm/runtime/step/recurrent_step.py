"""The prefill step of a model with states: the next tokens of one sequence, since a state runs on from token to token."""

import torch
from torch import Tensor

from compiled_llm.models.attention import PagedAttention
from compiled_llm.runtime.step.batch_inputs import PrefillInputs
from compiled_llm.runtime.step.step import Step
from compiled_llm.sampling_params import MAX_LOGPROBS
from passes.ops.top_logprobs import top_logprobs


class SequenceStep(Step):
    """Up to `size` tokens of the first row of `StepBuffers.prefill`, whose padding comes last there and first here."""

    def forward(self) -> None:
        state = self.state
        inputs = PrefillInputs.of(state.prefill, self.size, state.max_num_seqs, state.table_size)
        row, length, S = inputs.seq_rows[:1], inputs.seq_lens[:1], inputs.seq_rows.shape[0]
        self._tables()[:, row] = inputs.tables.view(state.num_groups, S, state.max_blocks)[
            :, :1
        ].int()
        state.params[row] = inputs.params.view(S, -1)[:1]
        count = inputs.query_start[1:2]
        padding, places = self.size - count, torch.arange(self.size, device=row.device)
        order = (places - padding) % self.size
        self.current.attention = self._attention(inputs, order, padding)
        try:
            logits = self.call_model.sequence(
                inputs.ids[order],
                inputs.positions[order],
                row,
                start=length - count,
                mask=(places >= padding).long(),
            )
        finally:
            self.current.attention = None
        if self.sampler == "scoring":
            scored = top_logprobs(
                logits[(places + padding) % self.size], inputs.targets, inputs.scores, MAX_LOGPROBS
            )
            state.prompt_logprobs[: self.size], state.prompt_ids[: self.size] = scored
        recent = torch.where(
            inputs.fresh[:1, None] > 0, inputs.recent.view(S, -1)[:1], state.recent[row]
        )
        self._sample(logits[-1:], row, length, recent, inputs.samples[:1])
        state.positions[row] = length

    def _attention(self, inputs: PrefillInputs, order: Tensor, padding: Tensor) -> PagedAttention:
        """Padding is a sequence of its own, of no tokens."""
        state, none = self.state, torch.zeros_like(padding)
        rows = torch.cat([none + state.max_num_seqs, inputs.seq_rows[:1]])
        return PagedAttention(
            caches=self.caches,
            groups=self.groups,
            windows=self.windows,
            slots=self._slots(inputs.rows[order], inputs.positions[order]),
            block_tables=self._tables()[:, rows],
            query_start=torch.cat([none, padding, none + self.size]).int(),
            seq_lens=torch.cat([none, inputs.seq_lens[:1]]).int(),
            split_counters=state.split_counters,
            max_query_len=max(self.size, 2),  # 1 would say that each of the two has a query
        )
