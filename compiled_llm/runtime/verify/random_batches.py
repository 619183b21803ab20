"""Random batches to verify a bucket with: rows, lengths and pages, reproducible by a seed.

A batch of shape "full" fills the bucket, "random" has a random size, and in "long" one sequence is
as long as the limits allow.

Shape suffixes, as in `buffers`: S sequences; T tokens; G groups of layers; N pages of a row at
most; C sampling parameters.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

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
from compiled_llm.runtime.verify.random_pages import NUM_SPARE, RandomPages, assign_pages
from compiled_llm.system.device_memory import free_bytes

_MAX_CACHED_TOKENS = 2048  # of all sequences together, or one page each where that is more
_TOP_LOGPROBS = 3
_LONG_ROWS = 2  # of a long decode batch, so that not all rows are long
_LONG_CHUNK = 32  # new tokens of a long prefill batch

BatchShape = Literal["full", "random", "long"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomBatch:
    """A batch for a bucket, and the state of its rows before it.

    Attributes:
        rows: [S] int64, distinct rows.
        idle_rows: int64, rows that have no part in the batch.
        num_cached: [S] int64, tokens that each row has cached.
        num_new: [S] int64, tokens of each row in the batch.
        pages: the pages of the rows.
        params: [S, C] int64, packed sampling parameters.
        tokens: [S] int64, ids that decoding rows feed.
        batch: the model runner's input.
        seed: of the random contents of state and pages.
    """

    rows: Int64
    idle_rows: Int64
    num_cached: Int64
    num_new: Int64
    pages: RandomPages
    params: Int64
    tokens: Int64
    batch: DecodeBatch | PrefillBatch
    seed: int

    def cached_slots(self, group: int, block_size: int) -> Int64:
        """Return the cache slots of the cached tokens, each once: long sequences reuse pages."""
        begins = np.zeros_like(self.num_cached)
        return np.unique(self._slots(group, block_size, begins, self.num_cached))

    def new_slots(self, group: int, block_size: int) -> Int64:
        """Return the cache slots of the batch's tokens, in their order."""
        return self._slots(group, block_size, self.num_cached, self.num_new)

    def _slots(self, group: int, block_size: int, begins: Int64, counts: Int64) -> Int64:
        sequence = np.repeat(np.arange(len(self.rows)), counts)
        positions = np.arange(counts.sum()) + np.repeat(begins - np.cumsum(counts) + counts, counts)
        pages = self.pages.tables[group, sequence, positions // block_size].astype(np.int64)
        slots: Int64 = (pages * block_size + positions % block_size)[pages != TRASH_PAGE]
        return slots


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sequences:
    """The fields of a `RandomBatch` that its inputs are made from."""

    rows: Int64
    num_cached: Int64
    num_new: Int64
    tables: NDArray[np.int32]
    params: Int64


def make_random_batch(
    bucket: Bucket, memory: Memory, limits: Limits, *, seed: int, shape: BatchShape
) -> RandomBatch:
    """Return a batch that the bucket holds."""
    rng = np.random.default_rng(seed)
    capacity = _capacity(memory, limits)
    if shape == "long":
        num_new = _long_counts(bucket, memory, limits, capacity)
    else:
        num_new = _random_counts(rng, bucket, memory, limits, capacity, full=shape == "full")
    blocks = -(-num_new // memory.block_size)
    max_cached_blocks = _MAX_CACHED_TOKENS // memory.block_size
    spare = min(capacity - int(blocks.sum()), max_cached_blocks) // len(num_new)
    num_cached = _random_cached(rng, bucket, memory, limits, num_new, blocks + spare, shape)
    permuted = rng.permutation(limits.max_num_seqs)
    rows, idle_rows = np.split(permuted[: len(num_new) + NUM_SPARE], [len(num_new)])
    pages = assign_pages(rng, memory, num_cached, num_new, spare)
    params = np.stack([_params(bucket.sampler, number, rng) for number in range(len(rows))])
    tokens = rng.integers(0, memory.state.logits.shape[1], len(rows))
    sequences = _Sequences(
        rows=rows, num_cached=num_cached, num_new=num_new, tables=pages.tables, params=params
    )
    make_batch = _decode_batch if bucket.kind == "decode" else _prefill_batch
    return RandomBatch(
        rows=rows,
        idle_rows=idle_rows,
        num_cached=num_cached,
        num_new=num_new,
        pages=pages,
        params=params,
        tokens=tokens,
        batch=make_batch(rng, bucket, memory, sequences),
        seed=seed,
    )


def _capacity(memory: Memory, limits: Limits) -> int:
    """Return how many pages the sequences may have together."""
    pages = [group.num_pages - 1 for group in memory.groups]
    return min(pages, default=limits.max_num_seqs * limits.max_model_len)


def _serves_one_sequence(bucket: Bucket, memory: Memory) -> bool:
    """Return whether the step is a prefill of a model with recurrent states."""
    return bucket.kind == "prefill" and memory.states is not None


def _random_cached(
    rng: np.random.Generator,
    bucket: Bucket,
    memory: Memory,
    limits: Limits,
    num_new: Int64,
    max_blocks: Int64,
    shape: BatchShape,
) -> Int64:
    """Return how many tokens each sequence has cached, [S]; about half of the prompts have none."""
    longest = np.minimum(limits.max_model_len, max_blocks * memory.block_size) - num_new
    shortest = np.minimum(longest, 1 if bucket.kind == "decode" else 0)
    num_cached = rng.integers(shortest, longest + 1)
    if bucket.kind == "prefill":
        num_cached[rng.random(len(num_new)) < 0.5] = 0
    if shape == "long":
        num_cached[0] = max(shortest[0], _longest_sequence(memory, limits) - num_new[0])
    is_padded = num_new[0] < bucket.size or memory.eager_bucket(bucket, limits) != bucket
    if _serves_one_sequence(bucket, memory) and is_padded:
        num_cached[:] = 0  # with recurrent states, only the beginning of a sequence is padded
    return num_cached


def _random_counts(
    rng: np.random.Generator,
    bucket: Bucket,
    memory: Memory,
    limits: Limits,
    capacity: int,
    *,
    full: bool,
) -> Int64:
    """Return how many new tokens each sequence has, [S]."""
    one_sequence, block_size = _serves_one_sequence(bucket, memory), memory.block_size
    max_seqs = min(bucket.size, 1 if one_sequence else limits.max_num_seqs, capacity)
    if bucket.kind == "decode":
        return np.ones(max_seqs if full else rng.integers(1, max_seqs + 1), np.int64)
    seqs = int(rng.integers(1, max_seqs + 1))
    max_tokens = capacity * block_size - seqs * (block_size - 1)
    total = min(bucket.size, seqs * limits.max_model_len, max_tokens)
    total = total if full else int(rng.integers(seqs, total + 1))
    cuts = np.sort(rng.permutation(total - 1)[: seqs - 1]) + 1
    counts: Int64 = np.minimum(np.diff([0, *cuts, total]), limits.max_model_len)
    return counts


def _long_counts(bucket: Bucket, memory: Memory, limits: Limits, capacity: int) -> Int64:
    """Return how many new tokens each sequence of a long batch has, [S]; the first is long."""
    if bucket.kind == "decode":
        rows = min(_LONG_ROWS, bucket.size, limits.max_num_seqs, capacity // 4)
        return np.ones(max(1, rows), np.int64)
    most = min(bucket.size, limits.max_model_len)
    one_sequence = _serves_one_sequence(bucket, memory)
    return np.array([most if one_sequence else min(most, _LONG_CHUNK)], np.int64)


def _longest_sequence(memory: Memory, limits: Limits) -> int:
    """Return the longest sequence that the plain reference of attention has memory for.

    It holds the keys and values of a sequence twice.
    """
    caches = [cache for cache in memory.caches if isinstance(cache, LayerCache)]
    bytes_per_token = [
        2 * (cache.k[0, 0].numel() + cache.v[0, 0].numel()) * (cache.k.itemsize + 4)
        for cache in caches
    ]
    free = free_bytes(memory.state.tokens.device) // 4
    return min([limits.max_model_len, *(max(1, free // size) for size in bytes_per_token)])


def _params(sampler: Sampler, number: int, rng: np.random.Generator) -> Int64:
    """Return the parameters of one row, [C]: those that the sampler supports take turns."""
    seed = int(rng.integers(2**62))
    choices: list[dict[str, Any]] = [{}]
    if sampler != "greedy":
        choices.append({"temperature": 1.0, "seed": seed})
    if sampler in ("full", "scoring"):
        penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "counted": True}
        choices.append({**penalties, "logprobs": _TOP_LOGPROBS})
        choices.append({"temperature": 1.0, "seed": seed, "top_k": 20, "min_p": 0.01})
    return SamplingTensors.pack(**choices[number % len(choices)])


def _decode_batch(
    rng: np.random.Generator, bucket: Bucket, memory: Memory, sequences: _Sequences
) -> DecodeBatch:
    """About half of the rows have just grown into their last page."""
    state, rows, tables = memory.state, sequences.rows, sequences.tables
    grown = np.flatnonzero(rng.random(len(rows)) < 0.5)
    grid = np.meshgrid(np.arange(len(tables)), grown, indexing="ij")
    groups, seqs = (axis.reshape(-1) for axis in grid)
    blocks = sequences.num_cached[seqs] // memory.block_size
    return DecodeBatch(
        rows=rows,
        patch_index=(groups * (state.max_num_seqs + 1) + rows[seqs]) * state.max_blocks + blocks,
        patch_page=tables[groups, seqs, blocks].astype(np.int64),
        sampler=bucket.sampler,
    )


def _prefill_batch(
    rng: np.random.Generator, bucket: Bucket, memory: Memory, sequences: _Sequences
) -> PrefillBatch:
    """About half of the rows with cached tokens and one new token decode."""
    num_cached, num_new = sequences.num_cached, sequences.num_new
    total, seqs, vocab_size = int(num_new.sum()), len(num_new), memory.state.logits.shape[1]
    may_decode = (num_cached > 0) & (num_new == 1) & (memory.states is None)
    decoding = (rng.random(seqs) < 0.5) & may_decode
    ids = rng.integers(0, vocab_size, total)
    ids[np.repeat(decoding, num_new)] = -1
    scoring = bucket.sampler == "scoring"
    return PrefillBatch(
        ids=ids,
        logprob_targets=rng.integers(0, vocab_size, total) if scoring else np.full(total, -1),
        num_logprobs=np.full(total, _TOP_LOGPROBS if scoring else -1),
        seq_rows=sequences.rows,
        starts=num_cached,
        lengths=num_new,
        block_tables=sequences.tables,
        params=sequences.params,
        recent=np.full((seqs, RECENT), -1),
        is_prompt=(~decoding).astype(np.int64),
        sample_mask=np.ones(seqs, np.int64),
        sampler=bucket.sampler,
    )
