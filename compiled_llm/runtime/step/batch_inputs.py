"""What the host says of a batch, and the same as a step reads it: views of one buffer, padded to a bucket.

Shapes as in `state`: R rows, G groups of N pages a row at most, C sampling parameters; B rows of a decode batch, T tokens and S
sequences of a prefill batch.
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
        rows: [B] whose turn it is.
        patch_index, patch_page: [P] entries of the flat block table that change, and what they become.
        sampler: what the rows ask for, together.
        unchanged: the rows are those of the decode batch before this one, and no entry changes.
    """

    rows: Int64
    patch_index: Int64 = field(default_factory=_empty)
    patch_page: Int64 = field(default_factory=_empty)
    sampler: Sampler = "greedy"
    unchanged: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillBatch:
    """The next tokens of some rows' sequences; a row that decodes brings one token, which the device knows.

    Attributes:
        ids: [T] token ids, -1 where it is the token last sampled in the row.
        targets, scores: [T] for the scoring sampler: the token whose logprob is wanted after this one, and how many top
            logprobs besides; -1 for nothing.
        seq_rows, starts, lengths: [S] each sequence's row, the position of its first token here, and their number.
        tables: [G, S, N] its pages; params: [S, C] its packed sampling parameters.
        recent: [S, RECENT] the tokens that precede the one to be sampled, -1 where there are none.
        fresh: [S] 1 for prompt tokens, where `recent` counts, 0 for a row that decodes.
        samples: [S] 1 where the sampled token counts, 0 where more of the prompt follows.
        sampler: what the sequences ask for, together.
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
    """One decode batch, as views of a single int64 buffer; padding is row R, and page 0 for the trash row's first entry."""

    rows: Tensor
    patch_index: Tensor
    patch_page: Tensor

    @classmethod
    def of(cls, buffer: Tensor, size: int, max_num_seqs: int) -> "DecodeInputs":
        rows, index, page = buffer.split(
            [max_num_seqs, *[(buffer.shape[0] - max_num_seqs) // 2] * 2]
        )
        num_patches = index.shape[0] // max_num_seqs * size
        return cls(rows[:size], index[:num_patches], page[:num_patches])


class PrefillInputs(NamedTuple):
    """One prefill batch, as views of a single int64 buffer. Padding has row R, position 0 and length 0.

    ids, positions, rows, targets, scores [T]: see `PrefillBatch`; the row of each token.
    seq_rows, seq_lens, fresh, samples [S]: lengths count all tokens after this step.
    query_start [S + 1]: where each sequence's tokens begin.
    params [S * C], recent [S * RECENT], tables [G * S * N]: flat.
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
        """Elements of each field; `table_size` is G * N."""
        S = min(num_tokens, max_num_seqs)
        return [
            *[num_tokens] * 5,
            *[S] * 4,
            S + 1,
            S * len(SamplingTensors._fields),
            S * RECENT,
            S * table_size,
        ]

    @classmethod
    def of(
        cls, buffer: Tensor, num_tokens: int, max_num_seqs: int, table_size: int
    ) -> "PrefillInputs":
        sizes = cls.sizes(num_tokens, max_num_seqs, table_size)
        return cls(*buffer[: sum(sizes)].split(sizes))
