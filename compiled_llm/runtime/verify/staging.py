"""Writes the state, the pages and the inputs of a random batch.

All pages of the batch hold NaN except at the tokens that its rows have cached, and so do the trash
page and the recurrent states of other rows: a step that reads anything else gives NaN. Pages of no
row lie between them, so that writes outside of a row's own pages show as well.
"""

import numpy as np
import torch
from torch import Tensor

from compiled_llm.models.attention import LayerCache
from compiled_llm.runtime.memory.allocation import Memory
from compiled_llm.runtime.step.batch_inputs import TRASH_PAGE, DecodeBatch
from compiled_llm.runtime.verify.random_batches import RandomBatch
from compiled_llm.runtime.verify.random_pages import NUM_REGIONS


def stage_random_batch(batch: RandomBatch, memory: Memory, size: int) -> None:
    """Prepare a step of `size`: state and pages as before the batch, and the batch's inputs.

    The contents are the same each time.
    """
    _stage_rows(batch, memory)
    for group, members in enumerate(memory.groups):
        for layer in members.layers:
            cache = memory.caches[layer]
            assert isinstance(cache, LayerCache)
            seed = batch.seed * 100_003 + 2 * layer
            _stage_pages(batch, group, cache.k, seed=seed, shift_regions=False)
            _stage_pages(batch, group, cache.v, seed=seed + 1, shift_regions=True)
    for number, slots in enumerate(memory.states.slots if memory.states is not None else ()):
        _stage_states(batch, slots, seed=batch.seed * 100_019 + number)
    if isinstance(batch.batch, DecodeBatch):
        memory.state.stage_decode(batch.batch)
    else:
        memory.state.stage_prefill(batch.batch, size)


def _stage_rows(batch: RandomBatch, memory: Memory) -> None:
    state = memory.state
    for name, buffer in state.named_buffers():
        if name != "decode_query_start":  # constant
            buffer.zero_()
    device = state.tokens.device
    rows = torch.from_numpy(batch.rows).to(device)
    state.tokens[rows] = torch.from_numpy(batch.tokens).to(device)
    state.positions[rows] = torch.from_numpy(batch.num_cached).to(device)
    state.params[rows] = torch.from_numpy(batch.params).to(device)
    state.recent[rows] = -1
    state.counts[rows] = torch.from_numpy(_random_counts(batch, state.counts.shape[1])).to(device)
    tables = state.block_table.view(state.num_groups, state.max_num_seqs + 1, state.max_blocks)
    tables[:, rows] = torch.from_numpy(batch.pages.tables).to(device)
    if isinstance(batch.batch, DecodeBatch):
        # The step itself must write the entries that the batch patches.
        state.block_table[torch.from_numpy(batch.batch.patch_index).to(device)] = TRASH_PAGE


def _random_counts(batch: RandomBatch, vocab_size: int) -> np.ndarray:
    """Return token counts of the rows, [S, V] int32; a tenth of the tokens have any."""
    rng = np.random.default_rng(batch.seed)
    counts = rng.integers(0, 4, (len(batch.rows), vocab_size))
    return (counts * (rng.random(vocab_size) < 0.1)).astype(np.int32)


def _stage_pages(
    batch: RandomBatch, group: int, cache: Tensor, *, seed: int, shift_regions: bool
) -> None:
    """Fill the slots of cached tokens with random values, and the rest of the pages with NaN.

    With `shift_regions`, the values of each region are around a mean of their own.
    """
    device, block_size = cache.device, cache.shape[1]
    generator = torch.Generator(device).manual_seed(seed)
    pages = torch.from_numpy(np.append(batch.pages.used[group], TRASH_PAGE)).to(device)
    cache[pages] = float("nan")
    slots = torch.from_numpy(batch.cached_slots(group, block_size)).to(device)
    content = torch.randn(len(slots), *cache.shape[2:], generator=generator, device=device)
    if shift_regions:
        region_of = torch.zeros(len(cache), dtype=torch.int64, device=device)
        region_of[pages[:-1]] = torch.from_numpy(batch.pages.regions[group]).to(device)
        shape = NUM_REGIONS + 1, *cache.shape[2:]
        means = 2 * torch.randn(*shape, generator=generator, device=device)
        means[0] = 0
        content += means[region_of[slots // block_size]]
    cache.view(-1, *cache.shape[2:])[slots] = content.to(cache.dtype)


def _stage_states(batch: RandomBatch, slots: Tensor, *, seed: int) -> None:
    """Fill the states of the batch's rows with random values, those of other rows with NaN."""
    device = slots.device
    generator = torch.Generator(device).manual_seed(seed)
    slots[torch.from_numpy(batch.idle_rows).to(device)] = float("nan")
    slots[-1] = float("nan")  # the trash row
    shape = len(batch.rows), *slots.shape[1:]
    content = torch.randn(*shape, generator=generator, device=device)
    slots[torch.from_numpy(batch.rows).to(device)] = content.to(slots.dtype)
