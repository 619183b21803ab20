"""Simulated model runner: each token is a function of those before it.

It keeps the state that the device keeps, and asserts what a step relies on: above all, that each
query attends, through its row's block table, to exactly the tokens of its own sequence.
"""

from collections.abc import Collection, Sequence
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray

from compiled_llm.config.schema import CacheConfig, Config, LimitsConfig
from compiled_llm.report.report import Report
from compiled_llm.runtime.buckets import SAMPLERS
from compiled_llm.runtime.limits import Limits
from compiled_llm.runtime.memory.kv_cache import KVCacheGroup
from compiled_llm.runtime.step.batch_inputs import RECENT, TRASH_PAGE, DecodeBatch, PrefillBatch
from compiled_llm.runtime.step.buffers import RING_SIZE
from compiled_llm.runtime.step.readback import Logprobs, StepHandle
from compiled_llm.runtime.step.sampler import SamplingTensors
from compiled_llm.runtime.step.sampler_state import SamplerState
from compiled_llm.sampling_params import MAX_LOGPROBS

VOCAB_SIZE = 24
_BIASED, _HOST_SAMPLED = 1, 8
_SEED, _TEMPERATURE, _FLAGS = map(SamplingTensors._fields.index, ("seed", "temperature", "flags"))


class Sequences:
    """All sequences so far, each with a number; 0 is the empty one."""

    def __init__(self) -> None:
        self._longer: dict[tuple[int, int], int] = {}
        self._hashes, self._tokens = [0], [-1]
        self._paths: list[NDArray[np.int64]] = [np.empty(0, np.int64)]

    def extend(self, sequence: int, tokens: Sequence[int]) -> int:
        for token in tokens:
            if (sequence, token) not in self._longer:
                self._hashes.append(hash((self._hashes[sequence], token)))
                self._tokens.append(token)
                self._paths.append(np.append(self._paths[sequence], len(self._paths)))
                self._longer[sequence, token] = len(self._paths) - 1
            sequence = self._longer[sequence, token]
        return sequence

    def path(self, sequence: int) -> NDArray[np.int64]:
        """Return the numbers of its prefixes, from one token up to the sequence itself."""
        return self._paths[sequence]

    def recent(self, sequence: int) -> list[int]:
        tokens = [self._tokens[number] for number in self.path(sequence)[-RECENT:]]
        return [-1] * (RECENT - len(tokens)) + tokens

    def draw(self, sequence: int, seed: int, banned: Collection[int] = ()) -> int:
        """Return the token that follows."""
        drawn = (
            (hash((self._hashes[sequence], seed, number)) >> 7) % VOCAB_SIZE for number in count()
        )
        return next(token for token in drawn if token not in banned)


class SimulatedModelRunner:
    """Stands in for `ModelRunner`: R rows, G groups of pages, N pages a row at most.

    Attributes:
        max_blocks: N; memory: this object, which has what the engine reads of it.
        num_tokens: computed so far; num_reads: steps whose tokens were read.
    """

    is_owner = True

    def __init__(
        self,
        groups: Sequence[KVCacheGroup],
        limits: Limits,
        *,
        block_size: int,
        prefill_sizes: list[int],
        apart: bool,
        sharing: bool,
        states: bool = False,
    ) -> None:
        self.groups, self.limits, self.block_size = groups, limits, block_size
        self.prefill_sizes, self.separate_decode, self.has_states = (
            prefill_sizes,
            apart or states,
            states,
        )
        cache = CacheConfig.model_construct(block_size=block_size, prefix_caching=sharing)
        self.config, self.report = Config(limits=LimitsConfig(), cache=cache), Report()
        self.memory = self
        self.max_blocks = -(-limits.max_model_len // block_size)
        self.sequences = Sequences()
        self.num_tokens = self.num_reads = self._num_steps = 0
        num_rows = limits.max_num_seqs + 1
        self._tokens, self._positions, self._last = np.full((3, num_rows), -1, np.int64)
        self._params = np.zeros((num_rows, len(SamplingTensors._fields)), np.int64)
        self._banned: list[set[int]] = [set() for _ in range(num_rows)]
        self._tables = np.zeros((len(groups), num_rows, self.max_blocks), np.int64)
        self._caches = [np.full((group.num_pages, block_size), -1, np.int64) for group in groups]
        self._staged = DecodeBatch(rows=np.empty(0, np.int64))
        self._ring: dict[int, NDArray[np.int64]] = {}
        self._scored: list[int] = []

    def check_owner(self) -> None:
        """Accept any thread."""

    def check_samplers(self, sampler: str, *, scoring: bool) -> None:
        """Accept any sampler."""

    def recover(self) -> None:
        """Do nothing: steps are counted after they have run."""

    def maybe_capture(self, *, prompts_pending: bool, steps_in_flight: bool) -> bool:
        """Return False: there is no bucket to capture."""
        return False

    def check_model(self) -> None:
        """Do nothing: there is no model."""

    def decode(self, batch: DecodeBatch) -> StepHandle:
        assert self.separate_decode
        assert len(batch.rows)
        if batch.unchanged:
            assert batch.rows.tolist() == self._staged.rows.tolist()
            assert not len(batch.patch_index)
        else:
            self._staged = batch
        batch = self._staged
        self._tables.reshape(-1)[batch.patch_index] = batch.patch_page
        rows = batch.rows.tolist()
        ids, ends = self._tokens[batch.rows], self._positions[batch.rows] + 1
        self._compute(rows, [[token] for token in ids.tolist()], ends.tolist())
        return self._sample(rows, rows, batch.sampler)

    def prefill(self, batch: PrefillBatch) -> StepHandle:
        rows, fresh = batch.seq_rows, batch.is_prompt > 0
        assert 0 < len(batch.ids) == batch.lengths.sum() <= self.limits.max_num_batched_tokens
        assert fresh.any() or not self.separate_decode
        assert (batch.lengths > 0).all()
        if self.has_states:
            assert len(rows) == 1, "tokens of other sequences"
            full = batch.lengths[0] == self.limits.max_num_batched_tokens
            assert full or batch.starts[0] == 0, "padding would come behind what a state knows"
        assert (batch.lengths[~fresh] == 1).all()
        assert (batch.starts[~fresh] == self._positions[rows[~fresh]]).all()
        assert ((batch.ids < 0) == ~np.repeat(fresh, batch.lengths)).all()
        self._tables[:, rows], self._params[rows] = batch.block_tables, batch.params
        ids = np.where(batch.ids < 0, self._tokens[np.repeat(rows, batch.lengths)], batch.ids)
        pieces = np.split(ids, np.cumsum(batch.lengths)[:-1])
        computed = self._compute(
            rows.tolist(),
            [piece.tolist() for piece in pieces],
            (batch.starts + batch.lengths).tolist(),
        )
        for number in np.flatnonzero(fresh & (batch.sample_mask > 0)):
            assert batch.recent[number].tolist() == self.sequences.recent(
                int(self._last[rows[number]])
            )
        self._scored = computed if batch.sampler == "scoring" else []
        return self._sample(rows.tolist(), rows[batch.sample_mask > 0].tolist(), batch.sampler)

    def tokens(self, handle: StepHandle) -> NDArray[np.int64]:
        assert self._num_steps - RING_SIZE <= handle.step
        self.num_reads += 1
        return self._ring[handle.step].copy()

    def prompt_logprobs(self, num_tokens: int) -> Logprobs:
        """Return as logprob of the token after a sequence the number of the sequence."""
        values = np.zeros((num_tokens, 1 + MAX_LOGPROBS), np.float32)
        values[:, 0] = self._scored
        return Logprobs(values, np.ones_like(values, np.int64))

    def write_sampler_state(self, row: int, extras: SamplerState) -> None:
        if extras.bias is not None:
            self._banned[row] = set(np.flatnonzero(np.isneginf(extras.bias)).tolist())

    def logits(self, row: int) -> torch.Tensor:
        return torch.zeros(1, VOCAB_SIZE)

    def sample_from_logits(self, row: int, logits: torch.Tensor) -> tuple[int, None]:
        self._tokens[row] = self._draw(row)
        return int(self._tokens[row]), None

    def _compute(self, rows: list[int], pieces: list[list[int]], ends: list[int]) -> list[int]:
        """Write all tokens before any is read, and return each token's sequence."""
        assert len(set(rows)) == len(rows) <= self.limits.max_num_seqs
        computed: list[int] = []
        for row, piece, end in zip(rows, pieces, ends, strict=True):
            before = int(self._look(0, row, end - len(piece) - 1, end - len(piece)).sum())
            self._last[row], self._positions[row] = self.sequences.extend(before, piece), end
            written = self.sequences.path(int(self._last[row]))[end - len(piece) :]
            for group, cache in enumerate(self._caches):
                cache[self._slots(group, row, end - len(piece), end)] = written
            computed.extend(written.tolist())
        for row, piece, end in zip(rows, pieces, ends, strict=True):
            path = self.sequences.path(int(self._last[row]))
            for number, group in enumerate(self.groups):
                first = max(0, group.reach.first_visible(end - len(piece)))
                assert self._look(number, row, first, end).tolist() == path[first:end].tolist(), (
                    "a query sees what is not its own"
                )
        self.num_tokens += len(computed)
        return computed

    def _sample(self, rows: list[int], wanted: list[int], sampler: str) -> StepHandle:
        """Sample a token in each row; only those of `wanted` rows may be read."""
        ring = np.full(len(self._tokens), -1, np.int64)
        for row in rows:
            host_sampled = self._params[row, _FLAGS] & _HOST_SAMPLED
            self._tokens[row] = -1 if host_sampled else self._draw(row)
        for row in wanted:
            _, temperature, flags = self._params[row, [_SEED, _TEMPERATURE, _FLAGS]].tolist()
            assert SAMPLERS.index(sampler) >= (2 if flags else 1 if temperature else 0)
            ring[row] = self._tokens[row]
        self._ring[self._num_steps] = ring
        self._num_steps += 1
        return StepHandle(self._num_steps - 1)

    def _draw(self, row: int) -> int:
        banned = self._banned[row] if self._params[row, _FLAGS] & _BIASED else ()
        return self.sequences.draw(int(self._last[row]), int(self._params[row, _SEED]), banned)

    def _look(self, group: int, row: int, first: int, end: int) -> NDArray[np.int64]:
        return self._caches[group][self._slots(group, row, max(first, 0), end)]

    def _slots(
        self, group: int, row: int, first: int, end: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        positions = np.arange(first, end)
        pages = self._tables[group, row, positions // self.block_size]
        assert (pages != TRASH_PAGE).all(), "a live token's page is the trash page"
        return pages, positions % self.block_size
