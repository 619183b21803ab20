"""One step of the model: ids in, next ids out, everything between in one traceable `forward()` without arguments.

All that a step reads and writes are buffers of `StepState` and of the layer caches; only its size shapes the graph. A step
of any size also runs eagerly, on the same state and the same caches: that is the fallback.
"""

from torch import Tensor, nn

from compiled_llm.models.attention import CURRENT, LayerCache, PagedAttention
from compiled_llm.runtime.sampling import sample
from compiled_llm.runtime.state import PrefillInputs, StepState


class Step(nn.Module):
    """What both kinds of step share: the model, its caches and the state."""

    def __init__(self, model: nn.Module, caches: nn.ModuleList, state: StepState, *, size: int) -> None:
        super().__init__()
        self.model, self.caches, self.state, self.size = model, caches, state, size
        self.current = CURRENT
        first = caches[0]
        assert isinstance(first, LayerCache)
        self.block_size = first.k.shape[1]

    def _slots(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Where in the caches the tokens at these positions of these rows live."""
        pages = self.state.block_table[rows, positions // self.block_size]
        return pages.long() * self.block_size + positions % self.block_size

    def _logits(self, ids: Tensor, positions: Tensor, attention: PagedAttention, wanted: Tensor | None) -> Tensor:
        """Logits [T, V] of the tokens, or [S, V] of those at the indices `wanted`."""
        self.current.attention = attention
        keep = {} if wanted is None else {"logits_to_keep": wanted}
        output = self.model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **keep)
        self.current.attention = None
        logits: Tensor = output.logits[0]
        return logits


class DecodeStep(Step):
    """One token for each of the first `size` rows; advances their tokens and positions."""

    def forward(self) -> None:
        state, n = self.state, self.size
        rows, positions, active = state.rows[:n], state.positions[:n], state.active[:n]
        cached = positions + 1
        attention = PagedAttention(
            caches=self.caches,
            slots=self._slots(rows, positions),
            block_table=state.block_table[:n],
            query_start=state.starts[: n + 1],
            seq_lens=(cached * active).int(),
            max_query_len=1,
        )
        logits = self._logits(state.tokens[:n], positions, attention, None)
        state.tokens[:n].copy_(sample(logits, state.temperature[:n], state.seed[:n], cached))
        positions.add_(active)


class PrefillStep(Step):
    """`size` prompt tokens of any rows, as `StepState.prefill` lays them out; samples after the last one of each row."""

    def forward(self) -> None:
        state = self.state
        inputs = PrefillInputs.of(state.prefill, self.size, state.max_num_seqs)
        attention = PagedAttention(
            caches=self.caches,
            slots=self._slots(inputs.rows, inputs.positions),
            block_table=state.block_table[inputs.seq_rows],
            query_start=inputs.query_start.int(),
            seq_lens=inputs.seq_lens.int(),
            max_query_len=self.size,
        )
        last = (inputs.query_start[1:] - 1).clamp(min=0)
        logits = self._logits(inputs.ids, inputs.positions, attention, last)
        seq_rows = inputs.seq_rows
        sampled = sample(logits, state.temperature[seq_rows], state.seed[seq_rows], inputs.seq_lens)
        state.tokens[seq_rows] = sampled
        state.positions[seq_rows] = inputs.seq_lens
