"""The step's inputs, as buffers at fixed addresses that every bucket shares.

Row state lives on the device from the moment a request joins until it leaves, and the step itself advances it: a decode
step needs nothing from the host. A prefill step brings its tokens in one copy from a staging buffer.

Shapes: R rows (the most requests at once) and one more, the trash row, that padding points to; N pages a row at most;
T tokens of a prefill bucket and S = min(T, R) sequences in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

TRASH_PAGE = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillChunk:
    """The next tokens of one row's sequence; `start` is the position of the first of them."""

    row: int
    tokens: Sequence[int]
    start: int


class PrefillInputs(NamedTuple):
    """One prefill batch, as views of a single int64 buffer. Padding has row R, position 0 and length 0.

    ids, positions, rows [T]: the tokens, their positions, and the row each belongs to.
    seq_rows, seq_lens [S]: the rows that take part, and their lengths after this step.
    query_start [S + 1]: where each one's tokens begin.
    """

    ids: Tensor
    positions: Tensor
    rows: Tensor
    seq_rows: Tensor
    seq_lens: Tensor
    query_start: Tensor

    @staticmethod
    def sizes(num_tokens: int, max_num_seqs: int) -> list[int]:
        num_seqs = min(num_tokens, max_num_seqs)
        return [num_tokens, num_tokens, num_tokens, num_seqs, num_seqs, num_seqs + 1]

    @classmethod
    def of(cls, buffer: Tensor, num_tokens: int, max_num_seqs: int) -> "PrefillInputs":
        sizes = cls.sizes(num_tokens, max_num_seqs)
        return cls(*buffer[: sum(sizes)].split(sizes))


class StepState(nn.Module):
    """Buffers of the rows, and of the prefill batch.

    tokens, positions [R + 1] int64: the id that each row feeds next, and its position, which is also how many it has cached.
    active [R + 1] int64: 1 where a decode step serves the row, 0 where the row is padding.
    block_table [R + 1, N] int32; temperature [R + 1] float32; seed [R + 1] int64.
    rows [R + 1] int64 and starts [R + 2] int32: 0, 1, 2, ...
    prefill int64: see `PrefillInputs`.
    """

    tokens: Tensor
    positions: Tensor
    active: Tensor
    seed: Tensor
    temperature: Tensor
    block_table: Tensor
    rows: Tensor
    starts: Tensor
    prefill: Tensor

    def __init__(self, *, max_num_seqs: int, max_blocks: int, max_tokens: int, device: torch.device) -> None:
        super().__init__()
        self.max_num_seqs = max_num_seqs
        num_rows, prefill_size = max_num_seqs + 1, sum(PrefillInputs.sizes(max_tokens, max_num_seqs))
        buffers = {
            "tokens": torch.zeros(num_rows, dtype=torch.int64),
            "positions": torch.zeros(num_rows, dtype=torch.int64),
            "active": torch.zeros(num_rows, dtype=torch.int64),
            "seed": torch.zeros(num_rows, dtype=torch.int64),
            "temperature": torch.zeros(num_rows, dtype=torch.float32),
            "block_table": torch.full((num_rows, max_blocks), TRASH_PAGE, dtype=torch.int32),
            "rows": torch.arange(num_rows, dtype=torch.int64),
            "starts": torch.arange(num_rows + 1, dtype=torch.int32),
            "prefill": torch.zeros(prefill_size, dtype=torch.int64),
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor.to(device), persistent=False)
        self._staging = torch.zeros(prefill_size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def join(self, row: int, *, pages: Sequence[int], temperature: float, seed: int) -> None:
        """A request takes a row: its pages and sampling parameters are written; `activate` follows its prefill."""
        table = torch.full((self.block_table.shape[1],), TRASH_PAGE, dtype=torch.int32)
        table[: len(pages)] = torch.as_tensor(pages, dtype=torch.int32)
        self.block_table[row].copy_(table)
        self.temperature[row] = temperature
        self.seed[row] = seed

    def activate(self, rows: Sequence[int]) -> None:
        """From now on decode steps serve these rows."""
        self.active[torch.tensor(rows, device=self.active.device)] = 1

    def leave(self, rows: Sequence[int]) -> None:
        """These rows become padding."""
        index = torch.tensor(rows, device=self.active.device)
        self.active[index] = 0
        self.positions[index] = 0
        self.block_table[index] = TRASH_PAGE

    def stage_prefill(self, chunks: Sequence[PrefillChunk], num_tokens: int) -> None:
        """Lay the chunks out for the bucket of `num_tokens`, padding included, and copy them in.

        Waits until the copy before this one has left the staging buffer, which it does when the step before has begun.
        """
        if self._copied is not None:
            self._copied.synchronize()
        staged = PrefillInputs.of(self._staging, num_tokens, self.max_num_seqs)
        for field in (staged.ids, staged.positions, staged.seq_lens):
            field.zero_()
        for field in (staged.rows, staged.seq_rows):
            field.fill_(self.max_num_seqs)
        end = 0
        for s, chunk in enumerate(chunks):
            begin, end = end, end + len(chunk.tokens)
            staged.ids[begin:end] = torch.tensor(chunk.tokens)
            staged.positions[begin:end] = torch.arange(chunk.start, chunk.start + len(chunk.tokens))
            staged.rows[begin:end] = chunk.row
            staged.seq_rows[s] = chunk.row
            staged.seq_lens[s] = chunk.start + len(chunk.tokens)
            staged.query_start[s] = begin
        staged.query_start[len(chunks) :] = end
        size = sum(PrefillInputs.sizes(num_tokens, self.max_num_seqs))
        self.prefill[:size].copy_(self._staging[:size], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
