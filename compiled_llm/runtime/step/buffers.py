"""The step's inputs and outputs, as buffers at fixed addresses that every bucket shares.

Row state lives on the device from a sequence's first prefill chunk until another takes the row, and the steps advance it: a
decode step needs nothing from the host unless rows joined or left or a sequence grew into a new page. What the host does have
to say goes up in one copy from pinned memory.

Shapes: R rows (the most sequences at once) and one more, the trash row, that padding points to; G groups of layers, each
with pages of its own; N pages a row at most; V tokens in the vocabulary; C sampling parameters of a row (see `RowParams`);
T tokens of a prefill bucket and S = min(T, R) sequences in it; K steps whose outputs are kept.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compiled_llm.runtime.step.batch_inputs import (
    RECENT,
    TRASH_PAGE,
    DecodeBatch,
    Int64,
    PrefillBatch,
    PrefillInputs,
)
from compiled_llm.runtime.step.sampler import (
    MAX_BAD_WORD_LEN,
    MAX_BAD_WORDS,
    RowParams,
)
from compiled_llm.sampling_params import MAX_LOGPROBS

RING = 4


class StepBuffers(nn.Module):
    """Buffers of the rows, of the batch, and of what the last steps gave.

    tokens, positions [R + 1] int64: the id that each row feeds next, and its position, which is also how many it has cached.
    params [R + 1, C] int64; block_table [G * (R + 1) * N] int32.
    bias [R + 1, V] float32 is added to the logits; counts [R + 1, V] int32 is 2 * times generated + whether in the prompt;
    bad_words [R + 1, W, L] int64 token sequences aligned right, -1 before them; recent [R + 1, RECENT] int64 the last tokens;
    logits [R + 1, V] of the row's last step. These five are kept up by the full sampler alone, for rows that use them.
    decode, prefill int64: see `DecodeInputs` and `PrefillInputs`.
    split_counters int32: what kernels whose programs meet count with; zeros between them (see `passes.ops.decode_attention`).
    ordinals [R + 1] int32: 0, 1, 2, ..., where the sequences of a decode step begin.
    step [1] int64 counts the steps; ring_tokens [K, R + 1] int64, ring_logprobs [K, R + 1, 1 + M] float32 and ring_ids int64 keep
    what they sampled, at `step % K`, -1 in rows without finite scores (for logprobs see `passes.ops.top_logprobs`).
    prompt_logprobs [T, 1 + M] float32 and prompt_ids int64: what the scoring sampler found for each token of the last prefill.
    """

    tokens: Tensor
    positions: Tensor
    params: Tensor
    block_table: Tensor
    bias: Tensor
    counts: Tensor
    bad_words: Tensor
    recent: Tensor
    logits: Tensor
    decode: Tensor
    prefill: Tensor
    split_counters: Tensor
    ordinals: Tensor
    step: Tensor
    ring_tokens: Tensor
    ring_logprobs: Tensor
    ring_ids: Tensor
    prompt_logprobs: Tensor
    prompt_ids: Tensor

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_blocks: int,
        max_tokens: int,
        num_groups: int,
        num_kv_heads: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.max_num_seqs, self.max_blocks, self.num_groups = max_num_seqs, max_blocks, num_groups
        num_rows, vocabulary = max_num_seqs + 1, (max_num_seqs + 1, vocab_size)
        prefill_size = sum(PrefillInputs.sizes(max_tokens, max_num_seqs, self.table_size))
        decode_size = max_num_seqs * (1 + 2 * num_groups)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "tokens": ((num_rows,), torch.int64),
            "positions": ((num_rows,), torch.int64),
            "params": ((num_rows, len(RowParams._fields)), torch.int64),
            "block_table": ((num_groups * num_rows * max_blocks,), torch.int32),
            "bias": (vocabulary, torch.float32),
            "counts": (vocabulary, torch.int32),
            "bad_words": ((num_rows, MAX_BAD_WORDS, MAX_BAD_WORD_LEN), torch.int64),
            "recent": ((num_rows, RECENT), torch.int64),
            "logits": (vocabulary, dtype),
            "decode": ((decode_size,), torch.int64),
            "prefill": ((prefill_size,), torch.int64),
            "split_counters": ((num_rows * num_kv_heads,), torch.int32),
            "step": ((1,), torch.int64),
            "ring_tokens": ((RING, num_rows), torch.int64),
            "ring_logprobs": ((RING, num_rows, 1 + MAX_LOGPROBS), torch.float32),
            "ring_ids": ((RING, num_rows, 1 + MAX_LOGPROBS), torch.int64),
            "prompt_logprobs": ((max_tokens, 1 + MAX_LOGPROBS), torch.float32),
            "prompt_ids": ((max_tokens, 1 + MAX_LOGPROBS), torch.int64),
        }
        for name, (shape, element) in shapes.items():
            self.register_buffer(
                name, torch.zeros(shape, dtype=element, device=device), persistent=False
            )
        self.register_buffer(
            "ordinals", torch.arange(num_rows, dtype=torch.int32, device=device), persistent=False
        )
        self._staging = [_Staging(max(prefill_size, decode_size), device) for _ in range(2)]
        self._turn = 0

    @property
    def table_size(self) -> int:
        return self.num_groups * self.max_blocks

    def stage_decode(self, batch: DecodeBatch) -> None:
        """Copy the batch's rows and patches in, padding included."""
        staging = self._next_staging()
        array = staging.array[: self.decode.shape[0]]
        num_patches = self.max_num_seqs * self.num_groups
        rows, index, page = np.split(array, [self.max_num_seqs, self.max_num_seqs + num_patches])
        for section, values, padding in (
            (rows, batch.rows, self.max_num_seqs),
            (index, batch.patch_index, self.max_num_seqs * self.max_blocks),
            (page, batch.patch_page, TRASH_PAGE),
        ):
            section[: len(values)] = values
            section[len(values) :] = padding
        staging.copy_to(self.decode)

    def stage_prefill(self, batch: PrefillBatch, num_tokens: int) -> None:
        """Lay the batch out for the bucket of `num_tokens`, padding included, and copy it in."""
        staging = self._next_staging()
        sizes = PrefillInputs.sizes(num_tokens, self.max_num_seqs, self.table_size)
        array = staging.array[: sum(sizes)]
        fields: Any = PrefillInputs._make(np.split(array, np.cumsum(sizes)[:-1]))  # of arrays here
        T, S, seqs = len(batch.ids), min(num_tokens, self.max_num_seqs), len(batch.seq_rows)
        array[:] = 0
        for section in (fields.rows, fields.seq_rows):
            section[:] = self.max_num_seqs
        ends = np.cumsum(batch.lengths)
        begins = ends - batch.lengths
        fields.ids[:T] = batch.ids
        fields.positions[:T] = np.arange(T) + np.repeat(batch.starts - begins, batch.lengths)
        fields.rows[:T] = np.repeat(batch.seq_rows, batch.lengths)
        fields.targets[:T] = np.minimum(
            batch.targets, self.logits.shape[1] - 1
        )  # a prompt's id may have no logit
        fields.scores[:] = -1
        fields.scores[:T] = batch.scores
        fields.seq_rows[:seqs], fields.seq_lens[:seqs] = (
            batch.seq_rows,
            batch.starts + batch.lengths,
        )
        fields.fresh[:seqs], fields.samples[:seqs] = batch.fresh, batch.samples
        fields.query_start[:seqs], fields.query_start[seqs:] = begins, T
        fields.params[: batch.params.size] = batch.params.reshape(-1)
        fields.recent[: batch.recent.size] = batch.recent.reshape(-1)
        fields.tables.reshape(self.num_groups, S, self.max_blocks)[:, :seqs] = batch.tables
        staging.copy_to(self.prefill[: sum(sizes)])

    def padding_batch(self) -> PrefillBatch:
        """A prefill batch of nothing but padding."""
        none = np.empty(0, np.int64)
        return PrefillBatch(
            ids=none, targets=none, scores=none, seq_rows=none, starts=none, lengths=none,
            tables=np.empty((self.num_groups, 0, self.max_blocks), np.int32), params=none.reshape(0, len(RowParams._fields)),
            recent=none.reshape(0, RECENT), fresh=none, samples=none,
        )  # fmt: skip

    def _next_staging(self) -> "_Staging":
        self._turn = (self._turn + 1) % len(self._staging)
        staging = self._staging[self._turn]
        staging.wait()
        return staging


class _Staging:
    """Pinned memory for one copy to the device; it may be written again when that copy has run."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._tensor = torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self.array: Int64 = self._tensor.numpy()

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()

    def copy_to(self, buffer: Tensor) -> None:
        buffer.copy_(self._tensor[: buffer.shape[0]], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
