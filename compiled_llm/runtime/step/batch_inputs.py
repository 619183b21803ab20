"""The inputs of a step: arrays on the host, and views of one device buffer padded to a bucket.

Shape suffixes, as in `buffers`: R rows (the most sequences at once); G groups of layers with
pages of their own; N pages of a row at most; C sampling parameters; B rows of a decode batch;
T tokens and S sequences of a prefill batch; P block-table patches.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from compiled_llm.config.schema import Sampler
from compiled_llm.runtime.step.sampler import MAX_BAD_WORD_LEN, SamplingTensors

TRASH_PAGE = 0
RECENT = MAX_BAD_WORD_LEN - 1

Int64 = NDArray[np.int64]


def _empty() -> Int64:
    return np.empty(0, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBatch:
    """One more token for each of some rows.

    Attributes:
        rows: [B] int64, the rows to advance.
        patch_index: [P] int64, entries of the flat block table that change.
        patch_page: [P] int64, the new pages of these entries.
        sampler: the cheapest sampler that serves all rows.
        unchanged: whether the rows equal those of the previous decode batch and no entry of the
            block table changes; the inputs already on the device are then used again.
    """

    rows: Int64
    patch_index: Int64 = field(default_factory=_empty)
    patch_page: Int64 = field(default_factory=_empty)
    sampler: Sampler = "greedy"
    unchanged: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillBatch:
    """The next tokens of some rows. A row that decodes takes part with one token.

    Attributes:
        ids: [T] int64 token ids; -1 stands for the token last sampled in the row, which is
            known to the device alone.
        logprob_targets: [T] int64, for the `scoring` sampler: the token whose logprob is returned
            at this position, or -1.
        num_logprobs: [T] int64, for the `scoring` sampler: how many top logprobs are returned
            besides the target's, or -1 for none at all.
        seq_rows: [S] int64, the row of each sequence.
        starts: [S] int64, the position of each sequence's first token in this batch.
        lengths: [S] int64, how many tokens of each sequence are in this batch.
        block_tables: [G, S, N] int32, the pages of each sequence.
        params: [S, C] int64, packed sampling parameters (see `SamplingTensors.pack`).
        recent: [S, RECENT] int64, the tokens before the one to sample, -1 where there are none.
        is_prompt: [S] int64, 1 for prompt tokens, for which `recent` is used; 0 for a row that
            decodes, whose recent tokens are on the device.
        sample_mask: [S] int64, 1 where the sampled token is used, 0 where more of the prompt
            follows.
        sampler: the cheapest sampler that serves all sequences.
    """

    ids: Int64
    logprob_targets: Int64
    num_logprobs: Int64
    seq_rows: Int64
    starts: Int64
    lengths: Int64
    block_tables: NDArray[np.int32]
    params: Int64
    recent: Int64
    is_prompt: Int64
    sample_mask: Int64
    sampler: Sampler = "greedy"


class DecodeInputs(NamedTuple):
    """A decode batch as views of one int64 buffer.

    Padding rows are row R, the trash row. Padding patches write the trash page to the first entry
    of the trash row.

    rows [B]; patch_index, patch_page [B * G].
    """

    rows: Tensor
    patch_index: Tensor
    patch_page: Tensor

    @classmethod
    def of(cls, buffer: Tensor, size: int, max_num_seqs: int) -> "DecodeInputs":
        """Split the buffer of `StepBuffers.decode_inputs` for a bucket of `size` rows."""
        max_patches = (buffer.shape[0] - max_num_seqs) // 2
        rows, index, page = buffer.split([max_num_seqs, max_patches, max_patches])
        num_patches = max_patches // max_num_seqs * size
        return cls(rows[:size], index[:num_patches], page[:num_patches])


class PrefillInputs(NamedTuple):
    """A prefill batch as views of one int64 buffer. Padding has row R, position 0 and length 0.

    ids, positions, rows, logprob_targets, num_logprobs [T]: see `PrefillBatch`; `rows` has the
        row of each token.
    seq_rows, seq_lens, is_prompt, sample_mask [S]: `seq_lens` counts all tokens of the sequence
        after this step.
    query_start [S + 1]: index of each sequence's first token.
    params [S * C], recent [S * RECENT], block_tables [G * S * N]: flat.
    """

    ids: Tensor
    positions: Tensor
    rows: Tensor
    logprob_targets: Tensor
    num_logprobs: Tensor
    seq_rows: Tensor
    seq_lens: Tensor
    is_prompt: Tensor
    sample_mask: Tensor
    query_start: Tensor
    params: Tensor
    recent: Tensor
    block_tables: Tensor

    @staticmethod
    def sizes(num_tokens: int, max_num_seqs: int, table_size: int) -> list[int]:
        """Return the number of elements of each field; `table_size` is G * N."""
        S = min(num_tokens, max_num_seqs)
        per_token, per_sequence = [num_tokens] * 5, [S] * 4
        flat = [S * len(SamplingTensors._fields), S * RECENT, S * table_size]
        return [*per_token, *per_sequence, S + 1, *flat]

    @classmethod
    def of(
        cls, buffer: Tensor, num_tokens: int, max_num_seqs: int, table_size: int
    ) -> "PrefillInputs":
        """Split the buffer of `StepBuffers.prefill_inputs` for a bucket of `num_tokens`."""
        sizes = cls.sizes(num_tokens, max_num_seqs, table_size)
        return cls(*buffer[: sum(sizes)].split(sizes))
