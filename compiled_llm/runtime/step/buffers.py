"""The inputs and outputs of a step, as buffers at fixed addresses that all buckets share.

The state of a row stays on the device from the first prefill chunk of its sequence until another
sequence takes the row, and steps advance it. A decode step therefore needs nothing from the host
unless rows joined or left, or a sequence grew into a new page. The host's part of a batch is
copied in one transfer from pinned memory.

Shape suffixes: R rows (the most sequences at once), plus one more, the trash row, for padding;
G groups of layers with pages of their own; N pages of a row at most; V tokens in the vocabulary;
C sampling parameters of a row (see `SamplingTensors`); W bad words of up to L tokens; T tokens of
a prefill batch and S = min(T, R) sequences in it; M top logprobs; K steps in the output ring.
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
    SamplingTensors,
)
from compiled_llm.sampling_params import MAX_LOGPROBS

RING_SIZE = 4


class StepBuffers(nn.Module):
    """Buffers of the rows, of the current batch, and of the outputs of the last steps.

    State of the rows:
        tokens [R + 1] int64: the id that each row feeds next.
        positions [R + 1] int64: its position, which equals the number of cached tokens.
        params [R + 1, C] int64: packed sampling parameters.
        block_table [G * (R + 1) * N] int32: flat.

    State of the rows that only the `full` sampler reads and updates:
        bias [R + 1, V] float32: added to the logits.
        counts [R + 1, V] int32: 2 * times generated + (1 if in the prompt).
        bad_words [R + 1, W, L] int64: token sequences, aligned right, padded with -1.
        recent [R + 1, RECENT] int64: the last tokens.
        logits [R + 1, V]: of each row's last step.

    The batch:
        decode_inputs, prefill_inputs int64: see `DecodeInputs` and `PrefillInputs`.
        decode_query_start [R + 1] int32: 0, 1, 2, ..., where each sequence of a decode step begins.
        split_counters int32: counters by which the programs of a kernel synchronize; zero between
            kernels (see `passes.ops.decode_attention`).

    Outputs; those of step i are at index i % K of a ring:
        step [1] int64: number of steps run so far.
        ring_tokens [K, R + 1] int64: sampled tokens, -1 in rows without finite logits.
        ring_logprobs [K, R + 1, 1 + M] float32, ring_logprob_ids [K, R + 1, 1 + M] int64: see
            `passes.ops.top_logprobs`.
        prompt_logprobs [T, 1 + M] float32, prompt_logprob_ids [T, 1 + M] int64: of the last prefill
            step with the `scoring` sampler.
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
    decode_inputs: Tensor
    prefill_inputs: Tensor
    split_counters: Tensor
    decode_query_start: Tensor
    step: Tensor
    ring_tokens: Tensor
    ring_logprobs: Tensor
    ring_logprob_ids: Tensor
    prompt_logprobs: Tensor
    prompt_logprob_ids: Tensor

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
        self.max_num_seqs = max_num_seqs
        self.max_blocks = max_blocks
        self.num_groups = num_groups
        num_rows = max_num_seqs + 1
        prefill_size = sum(PrefillInputs.sizes(max_tokens, max_num_seqs, self.table_size))
        decode_size = max_num_seqs * (1 + 2 * num_groups)
        logprobs_width = 1 + MAX_LOGPROBS
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "tokens": ((num_rows,), torch.int64),
            "positions": ((num_rows,), torch.int64),
            "params": ((num_rows, len(SamplingTensors._fields)), torch.int64),
            "block_table": ((num_groups * num_rows * max_blocks,), torch.int32),
            "bias": ((num_rows, vocab_size), torch.float32),
            "counts": ((num_rows, vocab_size), torch.int32),
            "bad_words": ((num_rows, MAX_BAD_WORDS, MAX_BAD_WORD_LEN), torch.int64),
            "recent": ((num_rows, RECENT), torch.int64),
            "logits": ((num_rows, vocab_size), dtype),
            "decode_inputs": ((decode_size,), torch.int64),
            "prefill_inputs": ((prefill_size,), torch.int64),
            "split_counters": ((num_rows * num_kv_heads,), torch.int32),
            "step": ((1,), torch.int64),
            "ring_tokens": ((RING_SIZE, num_rows), torch.int64),
            "ring_logprobs": ((RING_SIZE, num_rows, logprobs_width), torch.float32),
            "ring_logprob_ids": ((RING_SIZE, num_rows, logprobs_width), torch.int64),
            "prompt_logprobs": ((max_tokens, logprobs_width), torch.float32),
            "prompt_logprob_ids": ((max_tokens, logprobs_width), torch.int64),
        }
        for name, (shape, element) in shapes.items():
            zeros = torch.zeros(shape, dtype=element, device=device)
            self.register_buffer(name, zeros, persistent=False)
        query_start = torch.arange(num_rows, dtype=torch.int32, device=device)
        self.register_buffer("decode_query_start", query_start, persistent=False)
        self._staging = [_StagingBuffer(max(prefill_size, decode_size), device) for _ in range(2)]
        self._staging_index = 0

    @property
    def table_size(self) -> int:
        """Entries of one row in the block tables of all groups, G * N."""
        return self.num_groups * self.max_blocks

    def stage_decode(self, batch: DecodeBatch) -> None:
        """Copy the batch's rows and block-table patches to the device, padded to R rows."""
        staging = self._next_staging()
        array = staging.array[: self.decode_inputs.shape[0]]
        num_patches = self.max_num_seqs * self.num_groups
        rows, index, page = np.split(array, [self.max_num_seqs, self.max_num_seqs + num_patches])
        for section, values, padding in (
            (rows, batch.rows, self.max_num_seqs),
            (index, batch.patch_index, self.max_num_seqs * self.max_blocks),
            (page, batch.patch_page, TRASH_PAGE),
        ):
            section[: len(values)] = values
            section[len(values) :] = padding
        staging.copy_to(self.decode_inputs)

    def stage_prefill(self, batch: PrefillBatch, num_tokens: int) -> None:
        """Lay the batch out for a bucket of `num_tokens`, padding included, and copy it."""
        staging = self._next_staging()
        sizes = PrefillInputs.sizes(num_tokens, self.max_num_seqs, self.table_size)
        array = staging.array[: sum(sizes)]
        # The fields are arrays here, not tensors.
        fields: Any = PrefillInputs._make(np.split(array, np.cumsum(sizes)[:-1]))
        T, S, seqs = len(batch.ids), min(num_tokens, self.max_num_seqs), len(batch.seq_rows)
        ends = np.cumsum(batch.lengths)
        begins = ends - batch.lengths
        array[:] = 0
        fields.rows[:] = self.max_num_seqs
        fields.seq_rows[:] = self.max_num_seqs
        fields.num_logprobs[:] = -1

        fields.ids[:T] = batch.ids
        fields.positions[:T] = np.arange(T) + np.repeat(batch.starts - begins, batch.lengths)
        fields.rows[:T] = np.repeat(batch.seq_rows, batch.lengths)
        # The input embedding may have more rows than the output head.
        fields.logprob_targets[:T] = np.minimum(batch.logprob_targets, self.logits.shape[1] - 1)
        fields.num_logprobs[:T] = batch.num_logprobs

        fields.seq_rows[:seqs] = batch.seq_rows
        fields.seq_lens[:seqs] = batch.starts + batch.lengths
        fields.is_prompt[:seqs] = batch.is_prompt
        fields.sample_mask[:seqs] = batch.sample_mask
        fields.query_start[:seqs] = begins
        fields.query_start[seqs:] = T
        fields.params[: batch.params.size] = batch.params.reshape(-1)
        fields.recent[: batch.recent.size] = batch.recent.reshape(-1)
        tables = fields.block_tables.reshape(self.num_groups, S, self.max_blocks)
        tables[:, :seqs] = batch.block_tables
        staging.copy_to(self.prefill_inputs[: sum(sizes)])

    def padding_batch(self) -> PrefillBatch:
        """Return a prefill batch of padding alone."""
        none = np.empty(0, np.int64)
        return PrefillBatch(
            ids=none,
            logprob_targets=none,
            num_logprobs=none,
            seq_rows=none,
            starts=none,
            lengths=none,
            block_tables=np.empty((self.num_groups, 0, self.max_blocks), np.int32),
            params=none.reshape(0, len(SamplingTensors._fields)),
            recent=none.reshape(0, RECENT),
            is_prompt=none,
            sample_mask=none,
        )

    def _next_staging(self) -> "_StagingBuffer":
        self._staging_index = (self._staging_index + 1) % len(self._staging)
        staging = self._staging[self._staging_index]
        staging.wait()
        return staging


class _StagingBuffer:
    """Pinned host memory for one copy to the device. Call `wait` before writing it again."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._tensor = torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self.array: Int64 = self._tensor.numpy()

    def wait(self) -> None:
        """Wait until the last copy has been made."""
        if self._copied is not None:
            self._copied.synchronize()

    def copy_to(self, buffer: Tensor) -> None:
        """Start a copy of the first elements to the buffer, as many as it has."""
        buffer.copy_(self._tensor[: buffer.shape[0]], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
