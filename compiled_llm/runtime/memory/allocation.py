"""Allocate the memory of all steps after the weights are loaded."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from compiled_llm.config.schema import Config
from compiled_llm.models.discovery import AttentionLayer
from compiled_llm.models.exported_model import ServedModel
from compiled_llm.models.recurrent_state import RecurrentStates
from compiled_llm.models.state_discovery import allocate_states
from compiled_llm.report.report import Report
from compiled_llm.runtime.buckets import Bucket, BucketKind
from compiled_llm.runtime.limits import Limits
from compiled_llm.runtime.memory.kv_cache import (
    KVCacheGroup,
    allocate_caches,
    plan_groups,
    trash_groups,
)
from compiled_llm.runtime.step.batch_inputs import DecodeBatch
from compiled_llm.runtime.step.buffers import StepBuffers
from compiled_llm.runtime.step.recurrent_step import RecurrentStep
from compiled_llm.runtime.step.step import DecodeStep, PrefillStep, Step

STEPS: dict[BucketKind, type[Step]] = {"decode": DecodeStep, "prefill": PrefillStep}
STEPS_WITH_STATES: dict[BucketKind, type[Step]] = {"decode": DecodeStep, "prefill": RecurrentStep}


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The buffers and caches that every step reads and writes.

    Attributes:
        state: the step's buffers.
        states: recurrent states; None for a model without any.
        caches: a `LayerCache` for each attention layer.
        groups: the groups of layers whose pages are allocated together.
        block_size: tokens of a page.
    """

    state: StepBuffers
    states: RecurrentStates | None
    caches: nn.ModuleList
    groups: list[KVCacheGroup]
    block_size: int

    @property
    def max_blocks(self) -> int:
        """The most pages of a sequence in a group."""
        return self.state.max_blocks

    def eager_bucket(self, exact: Bucket, limits: Limits) -> Bucket:
        """Return the shape in which a batch of exactly this size runs eagerly.

        A model with recurrent states may compute one token in another way than several, and so
        with other rounding; its prefill steps have at least two tokens.
        """
        if exact.kind == "decode" or self.states is None:
            return exact
        return replace(exact, size=max(exact.size, min(2, limits.max_num_batched_tokens)))

    def step(self, model: ServedModel, bucket: Bucket) -> Step:
        """Return the step of a bucket, not compiled."""
        groups = dict(
            sorted((layer, g) for g, group in enumerate(self.groups) for layer in group.layers)
        )
        windows = tuple(self.groups[g].reach.encode() for g in groups.values())
        steps = STEPS if self.states is None else STEPS_WITH_STATES
        return steps[bucket.kind](
            model, self.caches, tuple(groups.values()), windows, self.state, self.states, bucket
        )


def allocate(
    model: ServedModel, layers: list[AttentionLayer], config: Config, limits: Limits, report: Report
) -> Memory:
    """Allocate the step's buffers and the KV cache.

    The KV cache gets the memory that is left after the activations, which are measured, and the
    CUDA graphs. Raises ValueError if not even one sequence fits (see `plan_groups`).
    """
    device, block_size = model.device, config.cache.block_size
    vocab_size: int = model.get_output_embeddings().weight.shape[0]
    state = StepBuffers(
        max_num_seqs=limits.max_num_seqs,
        max_blocks=-(-limits.max_model_len // block_size),
        max_tokens=limits.max_num_batched_tokens,
        num_groups=len({layer.reach for layer in layers}),
        num_kv_heads=max((layer.num_kv_heads for layer in layers), default=1),
        vocab_size=vocab_size,
        dtype=model.dtype,
        device=device,
    )
    states = allocate_states(model, limits.max_num_seqs)
    with report.phase("measure activations", device):
        reserved = _measure_activations(model, layers, state, states, block_size, limits)
    with report.phase("allocate KV cache", device):
        reserved += reserved_for_graphs(config, device)
        groups = plan_groups(config.cache, layers, limits, device, reserved=reserved)
        caches = allocate_caches(layers, groups, block_size, device)
    return Memory(state=state, states=states, caches=caches, groups=groups, block_size=block_size)


def reserved_for_graphs(config: Config, device: torch.device) -> int:
    """Return the bytes that the KV cache leaves to the CUDA graphs, which are recorded after it."""
    records = device.type == "cuda" and config.compile.dispatch != "eager"
    return config.memory.graphs if records and isinstance(config.memory.graphs, int) else 0


def _measure_activations(
    model: ServedModel,
    layers: list[AttentionLayer],
    state: StepBuffers,
    states: RecurrentStates | None,
    block_size: int,
    limits: Limits,
) -> int:
    """Return the peak bytes of an eager step of the largest prefill bucket; 0 on a CPU.

    The step computes padding on a cache that has only the trash page.
    """
    device = model.device
    if device.type != "cuda":
        return 0
    groups = trash_groups(layers)
    caches = allocate_caches(layers, groups, block_size, device)
    memory = Memory(state=state, states=states, caches=caches, groups=groups, block_size=block_size)
    bucket = Bucket("prefill", limits.max_num_batched_tokens, "full")
    stage_padding(state, bucket)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    memory.step(model, bucket)()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak


def stage_padding(state: StepBuffers, bucket: Bucket) -> None:
    """Write the inputs of a step that computes padding only."""
    if bucket.kind == "prefill":
        state.stage_prefill(state.padding_batch(), bucket.size)
    else:
        state.stage_decode(DecodeBatch(rows=np.empty(0, np.int64)))
