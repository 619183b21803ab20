"""Random batches to try a bucket with: rows, lengths, pages and contents that no request has, the same each time they are staged.

All of a trial's pages are NaN but for the tokens that its rows have cached, and so are the trash page and the states of other
rows: who reads what is not there, shows it. Pages of no row lie between them: who writes what is not its own, shows it, too.

In a trial of `extent` "long" one sequence is as long as any may be. To fill that many pages would take long, so its table has some
pages several times; they are in regions, each with values around a mean of its own, so that a step that leaves out a part of the
sequence, or reads another one instead, is off by far, although each of so many keys has little weight.

Shapes: S sequences, T tokens, G groups of layers, N pages a row at most, as in `state`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compiled_llm.config.schema import Sampler
from compiled_llm.models.attention import LayerCache
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.limits import Limits
from compiled_llm.runtime.memory.allocation import Memory
from compiled_llm.runtime.step.batch_inputs import (
    RECENT,
    TRASH_PAGE,
    DecodeBatch,
    Int64,
    PrefillBatch,
)
from compiled_llm.runtime.step.sampler import SamplingTensors
from compiled_llm.system.device_memory import free_bytes

_CACHED_TOKENS = 2048  # of all sequences of a trial together, or a page for each where that is more
_BYSTANDERS = 4
_TOP_LOGPROBS = 3
_LONG_ROWS = 2  # of a long decode trial, so that others stand by
_LONG_CHUNK = 32  # tokens that a long prefill trial brings
_REGIONS = 4

BatchShape = Literal["full", "random", "long"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomBatch:
    """A batch for a bucket, and what its rows have before it.

    Attributes:
        rows, starts, counts: [S] distinct rows, the tokens that each has cached, and those that it brings.
        bystanders: rows that have no part in it.
        tables: [G, S, N] pages; pages: of each group, those of the trial, pages of no row among them.
        regions: of each group, for each of its pages the region of a long sequence, from 1 on, or 0.
        params: [S, C]; tokens: [S] ids that decoding rows feed.
        batch: the same, as the runtime gets it.
        seed: of what is random in the state and the pages.
    """

    rows: Int64
    idle_rows: Int64
    starts: Int64
    counts: Int64
    tables: NDArray[np.int32]
    pages: list[Int64]
    regions: list[Int64]
    params: Int64
    tokens: Int64
    batch: DecodeBatch | PrefillBatch
    seed: int

    def slots(self, group: int, block_size: int, *, new: bool) -> Int64:
        """Where in the group's caches the tokens lie that the batch brings, or, each place once, those cached before it."""
        begins, counts = (
            (self.starts, self.counts) if new else (np.zeros_like(self.starts), self.starts)
        )
        owner = np.repeat(np.arange(len(self.rows)), counts)
        positions = np.arange(counts.sum()) + np.repeat(begins - np.cumsum(counts) + counts, counts)
        pages = self.tables[group, owner, positions // block_size].astype(np.int64)
        slots: Int64 = (pages * block_size + positions % block_size)[pages != TRASH_PAGE]
        return slots if new else np.unique(slots)


def make_random_batch(
    bucket: Bucket, memory: Memory, limits: Limits, *, seed: int, extent: BatchShape
) -> RandomBatch:
    """A batch that the bucket serves: as large as it can be, of a random size, or small, with a sequence as long as one can be."""
    rng, block_size, vocab_size = (
        np.random.default_rng(seed),
        memory.block_size,
        memory.state.logits.shape[1],
    )
    capacity = min(
        (group.num_pages - 1 for group in memory.groups),
        default=limits.max_num_seqs * limits.max_model_len,
    )
    alone = bucket.kind == "prefill" and memory.states is not None
    if extent == "long":
        counts = _long_counts(bucket, limits, capacity, alone=alone)
    else:
        most_seqs = 1 if alone else limits.max_num_seqs
        counts = _counts(
            rng, bucket, limits, capacity, block_size, full=extent == "full", most_seqs=most_seqs
        )
    blocks = -(-counts // block_size)
    spare = min(capacity - int(blocks.sum()), _CACHED_TOKENS // block_size) // len(counts)
    longest = np.minimum(limits.max_model_len - counts, (blocks + spare) * block_size - counts)
    shortest = np.minimum(longest, 1 if bucket.kind == "decode" else 0)
    starts = rng.integers(shortest, longest + 1)
    if bucket.kind == "prefill":
        starts[rng.random(len(counts)) < 0.5] = 0
    if extent == "long":
        starts[0] = max(shortest[0], _longest(memory, limits) - counts[0])
    if alone and (counts[0] < bucket.size or memory.eager_bucket(bucket, limits) != bucket):
        starts[:] = 0  # where a model has states, only the beginning of a sequence is padded
    rows, idle_rows = np.split(
        rng.permutation(limits.max_num_seqs)[: len(counts) + _BYSTANDERS], [len(counts)]
    )
    tables, pages, regions = _tables(rng, memory, starts, counts, spare)
    params = np.stack([_params(bucket.sampler, number, rng) for number in range(len(counts))])
    tokens = rng.integers(0, vocab_size, len(counts))
    make = _decode_batch if bucket.kind == "decode" else _prefill_batch
    batch = make(
        rng,
        bucket,
        memory,
        rows=rows,
        starts=starts,
        counts=counts,
        tables=tables,
        params=params,
        vocab_size=vocab_size,
    )
    return RandomBatch(
        rows=rows, idle_rows=idle_rows, starts=starts, counts=counts, tables=tables, pages=pages, regions=regions,
        params=params, tokens=tokens, batch=batch, seed=seed,
    )  # fmt: skip


def stage(trial: RandomBatch, memory: Memory, size: int) -> None:
    """Make the state and the pages what they are before the trial's batch, and lay that out for a step of this size."""
    _stage_rows(trial, memory)
    for group, members in enumerate(memory.groups):
        for layer in members.layers:
            cache = memory.caches[layer]
            assert isinstance(cache, LayerCache)
            for number, tensor in enumerate((cache.k, cache.v)):
                _stage_pages(
                    trial,
                    group,
                    tensor,
                    seed=trial.seed * 100_003 + 2 * layer + number,
                    shifted=number == 1,
                )
    for number, slots in enumerate(memory.states.slots if memory.states is not None else ()):
        _stage_states(trial, slots, seed=trial.seed * 100_019 + number)
    if isinstance(trial.batch, DecodeBatch):
        memory.state.stage_decode(trial.batch)
    else:
        memory.state.stage_prefill(trial.batch, size)


def _stage_rows(trial: RandomBatch, memory: Memory) -> None:
    state = memory.state
    for name, buffer in state.named_buffers():
        if name != "decode_query_start":
            buffer.zero_()
    device, rng = state.tokens.device, np.random.default_rng(trial.seed)
    rows = torch.from_numpy(trial.rows).to(device)
    state.tokens[rows] = torch.from_numpy(trial.tokens).to(device)
    state.positions[rows] = torch.from_numpy(trial.starts).to(device)
    state.params[rows] = torch.from_numpy(trial.params).to(device)
    state.recent[rows] = -1
    counts = rng.integers(0, 4, (len(trial.rows), state.counts.shape[1])) * (
        rng.random(state.counts.shape[1]) < 0.1
    )
    state.counts[rows] = torch.from_numpy(counts.astype(np.int32)).to(device)
    table = state.block_table.view(state.num_groups, state.max_num_seqs + 1, state.max_blocks)
    table[:, rows] = torch.from_numpy(trial.tables).to(device)
    if isinstance(trial.batch, DecodeBatch):  # what it patches is not there before
        state.block_table[torch.from_numpy(trial.batch.patch_index).to(device)] = TRASH_PAGE


def _stage_pages(
    trial: RandomBatch, group: int, cache: Tensor, *, seed: int, shifted: bool
) -> None:
    """Random where a token is cached, NaN where none is; the values (`shifted`) of a region around its mean."""
    generator = torch.Generator(cache.device).manual_seed(seed)
    pages = torch.from_numpy(np.append(trial.pages[group], TRASH_PAGE)).to(cache.device)
    cache[pages] = float("nan")
    slots = torch.from_numpy(trial.slots(group, cache.shape[1], new=False)).to(cache.device)
    content = torch.randn(len(slots), *cache.shape[2:], generator=generator, device=cache.device)
    if shifted:
        region_of = torch.zeros(len(cache), dtype=torch.int64, device=cache.device)
        region_of[pages[:-1]] = torch.from_numpy(trial.regions[group]).to(cache.device)
        means = 2 * torch.randn(
            _REGIONS + 1, *cache.shape[2:], generator=generator, device=cache.device
        )
        means[0] = 0
        content += means[region_of[slots // cache.shape[1]]]
    cache.view(-1, *cache.shape[2:])[slots] = content.to(cache.dtype)


def _stage_states(trial: RandomBatch, slots: Tensor, *, seed: int) -> None:
    """Random where a row is of the trial, NaN where it is not, nor is a row that padding stands for."""
    generator = torch.Generator(slots.device).manual_seed(seed)
    slots[torch.from_numpy(trial.idle_rows).to(slots.device)] = float("nan")
    slots[-1] = float("nan")
    content = torch.randn(
        len(trial.rows), *slots.shape[1:], generator=generator, device=slots.device
    )
    slots[torch.from_numpy(trial.rows).to(slots.device)] = content.to(slots.dtype)


def _counts(
    rng: np.random.Generator,
    bucket: Bucket,
    limits: Limits,
    capacity: int,
    block_size: int,
    *,
    full: bool,
    most_seqs: int,
) -> NDArray[np.int64]:
    """How many tokens each sequence brings, [S]."""
    most = min(bucket.size, most_seqs, capacity)
    if bucket.kind == "decode":
        return np.ones(most if full else rng.integers(1, most + 1), np.int64)
    seqs = int(rng.integers(1, most + 1))
    total = min(
        bucket.size, seqs * limits.max_model_len, capacity * block_size - seqs * (block_size - 1)
    )
    total = total if full else int(rng.integers(seqs, total + 1))
    cuts = np.sort(rng.permutation(total - 1)[: seqs - 1]) + 1
    counts: NDArray[np.int64] = np.minimum(np.diff([0, *cuts, total]), limits.max_model_len)
    return counts


def _long_counts(bucket: Bucket, limits: Limits, capacity: int, *, alone: bool) -> Int64:
    """How many tokens each sequence of a long trial brings, [S]; the first is the long one."""
    if bucket.kind == "decode":
        return np.ones(
            max(1, min(_LONG_ROWS, bucket.size, limits.max_num_seqs, capacity // 4)), np.int64
        )
    most = min(bucket.size, limits.max_model_len)
    return np.array([most if alone else min(most, _LONG_CHUNK)], np.int64)


def _longest(memory: Memory, limits: Limits) -> int:
    """How long a sequence may be for a plain reference of attention to have its keys and values in memory twice."""
    caches = [cache for cache in memory.caches if isinstance(cache, LayerCache)]
    a_token = [2 * (c.k[0, 0].numel() + c.v[0, 0].numel()) * (c.k.itemsize + 4) for c in caches]
    free = free_bytes(memory.state.tokens.device) // 4
    return min([limits.max_model_len, *(max(1, free // size) for size in a_token)])


def _tables(
    rng: np.random.Generator, memory: Memory, starts: Int64, counts: Int64, spare: int
) -> tuple[NDArray[np.int32], list[Int64], list[Int64]]:
    """Pages for the sequences, the trash page where no window reaches; all pages of each group, some of no row; their regions.

    A sequence has at most `spare` pages more than the tokens that it brings fill; where it needs more, some are used several times.
    """
    state, block_size = memory.state, memory.block_size
    tables = np.full((len(memory.groups), len(starts), state.max_blocks), TRASH_PAGE, np.int32)
    all_pages, all_regions = [], []
    for group, members in enumerate(memory.groups):
        free = rng.permutation(members.num_pages - 1) + 1
        regions, taken = np.zeros(len(free), np.int64), 0
        for seq, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
            first, written = (
                max(0, members.reach.first_visible(start)) // block_size,
                start // block_size,
            )
            end = -(-(start + count) // block_size)
            before = min(written - first, max(1, spare + -(-count // block_size) - (end - written)))
            if before < written - first:
                regions[taken : taken + before] = _regions(before) + 1
                chosen = _chosen(rng, written - first, before)
            else:
                chosen = np.arange(before)
            tables[group, seq, first:written] = free[taken + chosen]
            taken += before
            tables[group, seq, written:end] = free[taken : taken + end - written]
            taken += end - written
        all_pages.append(free[: taken + _BYSTANDERS])
        all_regions.append(regions[: taken + _BYSTANDERS])
    return tables, all_pages, all_regions


def _regions(length: int) -> Int64:
    """The region, from 0 on, of each of so many places in a row."""
    regions: Int64 = np.arange(length) * _REGIONS // length
    return regions


def _chosen(rng: np.random.Generator, blocks: int, pages: int) -> Int64:
    """For each block of a sequence one of fewer pages, at random among those of its region."""
    bounds = np.searchsorted(_regions(pages), np.arange(_REGIONS + 1))
    begins, ends = bounds[_regions(blocks)], bounds[_regions(blocks) + 1]
    chosen: Int64 = np.where(
        begins < ends, begins + (rng.random(blocks) * (ends - begins)).astype(np.int64), 0
    )
    return chosen


def _params(sampler: Sampler, number: int, rng: np.random.Generator) -> Int64:
    """Of one row: greedy, drawn, and for the samplers that serve them penalised and cut off, in turn."""
    seed = int(rng.integers(2**62))
    turns: list[dict[str, Any]] = [{}]
    if sampler != "greedy":
        turns.append({"temperature": 1.0, "seed": seed})
    if sampler in ("full", "scoring"):
        turns.append(
            {
                "presence_penalty": 0.5,
                "frequency_penalty": 0.25,
                "counted": True,
                "logprobs": _TOP_LOGPROBS,
            }
        )
        turns.append({"temperature": 1.0, "seed": seed, "top_k": 20, "min_p": 0.01})
    return SamplingTensors.pack(**turns[number % len(turns)])


def _decode_batch(
    rng: np.random.Generator, bucket: Bucket, memory: Memory, **values: Any
) -> DecodeBatch:
    """Half of the rows have just grown into their last page."""
    state, rows, starts, tables = memory.state, values["rows"], values["starts"], values["tables"]
    grown = np.flatnonzero(rng.random(len(rows)) < 0.5)
    groups, seqs = (
        axis.reshape(-1) for axis in np.meshgrid(np.arange(len(tables)), grown, indexing="ij")
    )
    blocks = starts[seqs] // memory.block_size
    return DecodeBatch(
        rows=rows,
        patch_index=(groups * (state.max_num_seqs + 1) + rows[seqs]) * state.max_blocks + blocks,
        patch_page=tables[groups, seqs, blocks].astype(np.int64),
        sampler=bucket.sampler,
    )


def _prefill_batch(
    rng: np.random.Generator, bucket: Bucket, memory: Memory, **values: Any
) -> PrefillBatch:
    """A row that has tokens cached and brings one may be one that decodes."""
    starts, counts = values["starts"], values["counts"]
    total, seqs = int(counts.sum()), len(counts)
    decoding = (starts > 0) & (counts == 1) & (rng.random(seqs) < 0.5) & (memory.states is None)
    ids = rng.integers(0, values["vocab_size"], total)
    ids[np.repeat(decoding, counts)] = -1
    scoring = bucket.sampler == "scoring"
    return PrefillBatch(
        ids=ids,
        logprob_targets=rng.integers(0, values["vocab_size"], total)
        if scoring
        else np.full(total, -1),
        num_logprobs=np.full(total, _TOP_LOGPROBS if scoring else -1),
        seq_rows=values["rows"],
        starts=starts,
        lengths=counts,
        block_tables=values["tables"],
        params=values["params"],
        recent=np.full((seqs, RECENT), -1),
        is_prompt=(~decoding).astype(np.int64),
        sample_mask=np.ones(seqs, np.int64),
        sampler=bucket.sampler,
    )
