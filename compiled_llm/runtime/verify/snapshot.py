"""What a step leaves of a trial: read from the state and the pages, which are put back afterwards."""

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
    """What a step left of a trial. S sequences, T tokens, V tokens in the vocabulary; keys and values of each layer in turn.

    tokens, positions [S]: what the rows go on with; sampled [S]: the tokens that the step reported.
    logits [S, V] or None; scored [T] logprobs of the prompt, none unless the sampler is scoring.
    written: the keys or values of the batch's tokens; states: [S, ...] each state of the rows.
    kept: keys or values of all other places in the trial's pages, and states of its bystanders.
    """

    tokens: Tensor
    sampled: Tensor
    positions: Tensor
    logits: Tensor | None
    scored: Tensor
    written: list[Tensor]
    kept: list[Tensor]
    states: list[Tensor]


@contextmanager
def preserve(memory: Memory, trial: RandomBatch) -> Iterator[None]:
    """Afterwards all that a trial touches is as before: state, pages, states of its rows, trash. Copies wait on the host."""
    state = {name: buffer.to("cpu", copy=True) for name, buffer in memory.state.named_buffers()}
    pages = [
        (cache, pages, cache[pages].cpu()) for cache, pages in _caches(memory, trial, trash=True)
    ]
    for slots in _states(memory):
        rows = torch.from_numpy(np.concatenate([trial.rows, trial.idle_rows, [len(slots) - 1]])).to(
            slots.device
        )
        pages.append((slots, rows, slots[rows].cpu()))
    try:
        yield
    finally:
        for name, buffer in memory.state.named_buffers():
            buffer.copy_(state[name])
        for cache, numbers, content in pages:
            cache[numbers] = content.to(cache.device)


def take_snapshot(trial: RandomBatch, memory: Memory, bucket: Bucket) -> Snapshot:
    """Read it after a step of this bucket; what the step wrote to the pages becomes zeros."""
    state, rows = memory.state, torch.from_numpy(trial.rows).to(memory.state.tokens.device)
    logits = state.logits[rows].float() if bucket.sampler in ("full", "scoring") else None
    scored = (
        state.prompt_logprobs[: int(trial.counts.sum()), 0]
        if bucket.sampler == "scoring"
        else state.prompt_logprobs[:0, 0]
    )
    written, kept = [], []
    for cache, pages, slots in _written(memory, trial):
        flat = cache.view(-1, *cache.shape[2:])
        written.append(flat[slots].float().cpu())
        flat[slots] = 0
        kept.append(cache[pages].cpu())
    kept += [
        slots[torch.from_numpy(trial.idle_rows).to(slots.device)].cpu() for slots in _states(memory)
    ]
    return Snapshot(
        tokens=state.tokens[rows],
        sampled=state.ring_tokens[(state.step - 1) % RING_SIZE, rows],
        positions=state.positions[rows],
        logits=logits,
        scored=scored.clone(),
        written=written,
        kept=kept,
        states=[slots[rows].float() for slots in _states(memory)],
    )


def _written(memory: Memory, trial: RandomBatch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The keys and the values of each layer, the trial's pages of them, and where the batch's own tokens are."""
    groups = {layer: number for number, group in enumerate(memory.groups) for layer in group.layers}
    layers = [layer for group in memory.groups for layer in group.layers for _ in "kv"]
    for layer, (cache, pages) in zip(layers, _caches(memory, trial, trash=False), strict=True):
        slots = trial.slots(groups[layer], memory.block_size, new=True)
        yield cache, pages, torch.from_numpy(slots).to(cache.device)


def _caches(memory: Memory, trial: RandomBatch, *, trash: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """The keys and the values of each layer, and the numbers of the trial's pages of them."""
    for group, members in enumerate(memory.groups):
        numbers = [*trial.pages[group].tolist(), *([TRASH_PAGE] if trash else [])]
        for layer in members.layers:
            cache = memory.caches[layer]
            assert isinstance(cache, LayerCache)
            for tensor in (cache.k, cache.v):
                yield tensor, torch.tensor(numbers, device=tensor.device)


def _states(memory: Memory) -> list[Tensor]:
    return memory.states.slots if memory.states is not None else []
