"""Reads what a step leaves in the state and the pages of a random batch, and restores them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compiled_llm.models.attention import LayerCache
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.memory.allocation import Memory
from compiled_llm.runtime.step.batch_inputs import TRASH_PAGE
from compiled_llm.runtime.step.buffers import RING_SIZE
from compiled_llm.runtime.verify.random_batches import RandomBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The results of one step.

    Shapes: S rows of the batch; T tokens of the batch; V tokens in the vocabulary.

    Attributes:
        tokens: [S] int64, the ids that the rows feed next.
        sampled: [S] int64, the ids that the step reported.
        positions: [S] int64, the positions of these ids.
        logits: [S, V] float32, or None if the sampler stores none.
        scored: [T] float32 logprobs of the prompt; empty unless the sampler is `scoring`.
        written: for each layer's keys and values, those of the batch's tokens, [T, heads, dim].
        untouched: keys and values of all other slots in the batch's pages, and states of idle rows.
        states: [S, ...] float32 each, the recurrent states of the rows.
    """

    tokens: Tensor
    sampled: Tensor
    positions: Tensor
    logits: Tensor | None
    scored: Tensor
    written: list[Tensor]
    untouched: list[Tensor]
    states: list[Tensor]


@contextmanager
def preserve(memory: Memory, batch: RandomBatch) -> Iterator[None]:
    """Restore all that a batch overwrites: state, pages, recurrent states. Copies on the host."""
    state = {name: buffer.to("cpu", copy=True) for name, buffer in memory.state.named_buffers()}
    saved = [
        (cache, pages, cache[pages].cpu())
        for cache, pages in _cache_pages(memory, batch, with_trash=True)
    ]
    for slots in _states(memory):
        numbers = np.concatenate([batch.rows, batch.idle_rows, [len(slots) - 1]])
        rows = torch.from_numpy(numbers).to(slots.device)
        saved.append((slots, rows, slots[rows].cpu()))
    try:
        yield
    finally:
        for name, buffer in memory.state.named_buffers():
            buffer.copy_(state[name])
        for tensor, indices, content in saved:
            tensor[indices] = content.to(tensor.device)


def take_snapshot(batch: RandomBatch, memory: Memory, bucket: Bucket) -> Snapshot:
    """Read the results of a step of this bucket, and set what it wrote to the pages to zero."""
    state = memory.state
    rows = torch.from_numpy(batch.rows).to(state.tokens.device)
    stores_logits = bucket.sampler in ("full", "scoring")
    num_scored = int(batch.num_new.sum()) if bucket.sampler == "scoring" else 0
    written, untouched = [], []
    for cache, pages, slots in _written_slots(memory, batch):
        flat = cache.view(-1, *cache.shape[2:])
        written.append(flat[slots].float().cpu())
        flat[slots] = 0
        untouched.append(cache[pages].cpu())
    for states in _states(memory):
        idle_rows = torch.from_numpy(batch.idle_rows).to(states.device)
        untouched.append(states[idle_rows].cpu())
    return Snapshot(
        tokens=state.tokens[rows],
        sampled=state.ring_tokens[(state.step - 1) % RING_SIZE, rows],
        positions=state.positions[rows],
        logits=state.logits[rows].float() if stores_logits else None,
        scored=state.prompt_logprobs[:num_scored, 0].clone(),
        written=written,
        untouched=untouched,
        states=[states[rows].float() for states in _states(memory)],
    )


def _written_slots(memory: Memory, batch: RandomBatch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield each layer's keys and values, the batch's pages, and the slots of its new tokens."""
    groups = {layer: number for number, group in enumerate(memory.groups) for layer in group.layers}
    layers = [layer for group in memory.groups for layer in group.layers for _ in "kv"]
    caches = _cache_pages(memory, batch, with_trash=False)
    for layer, (cache, pages) in zip(layers, caches, strict=True):
        slots = batch.new_slots(groups[layer], memory.block_size)
        yield cache, pages, torch.from_numpy(slots).to(cache.device)


def _cache_pages(
    memory: Memory, batch: RandomBatch, *, with_trash: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each layer's keys and values, and the numbers of the batch's pages in them."""
    for group, members in enumerate(memory.groups):
        numbers = [*batch.pages.used[group].tolist(), *([TRASH_PAGE] if with_trash else [])]
        for layer in members.layers:
            cache = memory.caches[layer]
            assert isinstance(cache, LayerCache)
            for tensor in (cache.k, cache.v):
                yield tensor, torch.tensor(numbers, device=tensor.device)


def _states(memory: Memory) -> list[Tensor]:
    return memory.states.slots if memory.states is not None else []
