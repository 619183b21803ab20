"""Size and allocate the paged KV cache."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from compiled_llm.config.schema import CacheConfig
from compiled_llm.models.attention import LayerCache
from compiled_llm.models.discovery import AttentionLayer
from compiled_llm.runtime.limits import Limits
from compiled_llm.system.device_memory import free_bytes
from passes.attention_reach import AttentionReach

NUM_TRASH_PAGES = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheGroup:
    """Layers that attend equally far back and so allocate and free pages together.

    Attributes:
        reach: the tokens to which the layers attend.
        layers: their numbers, in call order.
        num_pages: number of pages of each layer's cache, including the trash page.
    """

    reach: AttentionReach
    layers: tuple[int, ...]
    num_pages: int


def trash_groups(layers: list[AttentionLayer]) -> list[KVCacheGroup]:
    """Return the groups of the layers with only the trash page."""
    reaches = dict.fromkeys(layer.reach for layer in layers)
    members = {
        reach: tuple(number for number, layer in enumerate(layers) if layer.reach == reach)
        for reach in reaches
    }
    return [
        KVCacheGroup(reach=reach, layers=members[reach], num_pages=NUM_TRASH_PAGES)
        for reach in reaches
    ]


def plan_groups(
    config: CacheConfig,
    layers: list[AttentionLayer],
    limits: Limits,
    device: torch.device,
    *,
    reserved: int,
) -> list[KVCacheGroup]:
    """Return the groups of the layers with as many pages as the memory allows.

    Each group gets the pages of one sequence. The rest of the memory, up to the pages of
    `max_num_seqs` sequences, is split in proportion to the pages of a sequence.

    Args:
        config: `memory` is a number of bytes or "auto".
        layers: the attention layers, in call order.
        limits: of the engine.
        device: of the caches.
        reserved: bytes that "auto" leaves for activations and CUDA graphs.

    Raises:
        ValueError: not even one sequence of `max_model_len` tokens fits.
    """
    groups = trash_groups(layers)
    page_bytes = [
        config.block_size * sum(layers[n].bytes_per_token for n in group.layers) for group in groups
    ]
    pages_per_seq = [max_pages_per_seq(group.reach, config.block_size, limits) for group in groups]
    budget = (
        max(0, _automatic_budget(config, device) - reserved)
        if config.memory == "auto"
        else config.memory
    )
    pages_and_bytes = list(zip(pages_per_seq, page_bytes, strict=True))
    minimum = sum((pages + NUM_TRASH_PAGES) * size for pages, size in pages_and_bytes)
    if minimum > budget:
        raise ValueError(
            f"the KV cache gets {budget / 2**20:.0f} MiB, but one sequence of "
            f"{limits.max_model_len} tokens needs {minimum / 2**20:.0f} MiB: lower "
            "limits.max_model_len or raise cache.memory"
        )
    other_seqs = limits.max_num_seqs - 1
    wanted = other_seqs * sum(pages * size for pages, size in pages_and_bytes)
    spare = min(budget - minimum, wanted)
    extra = [other_seqs * pages * spare // wanted if wanted else 0 for pages in pages_per_seq]
    if config.memory == "auto" and spare < wanted:
        extra = [_round_down(pages) for pages in extra]
    return [
        replace(group, num_pages=NUM_TRASH_PAGES + pages + more)
        for group, pages, more in zip(groups, pages_per_seq, extra, strict=True)
    ]


def _round_down(pages: int) -> int:
    """Round down by less than 1 % to a multiple of a power of 2.

    So shapes stay the same when the next start finds slightly more or less free memory.
    """
    shift = max(0, pages.bit_length() - 8)
    return pages >> shift << shift


def max_pages_per_seq(reach: AttentionReach, block_size: int, limits: Limits) -> int:
    """Return the most pages that one sequence holds at a time.

    They hold all its tokens; with a limited reach, those in reach and those of one step.
    """
    length = limits.max_model_len
    if not reach.is_full:
        step = min(limits.max_num_batched_tokens, length)
        length = min(length, reach.size + step + 2 * block_size)
    return -(-length // block_size)


def allocate_caches(
    layers: list[AttentionLayer], groups: list[KVCacheGroup], block_size: int, device: torch.device
) -> nn.ModuleList:
    """Allocate a zeroed cache for each attention layer.

    Keys and values have the shape [num_pages, block_size, num_kv_heads, key or value dim].
    """
    num_pages = {layer: group.num_pages for group in groups for layer in group.layers}

    def zeros(number: int, layer: AttentionLayer, dim: int) -> torch.Tensor:
        return torch.zeros(
            num_pages[number], block_size, layer.num_kv_heads, dim, dtype=layer.dtype, device=device
        )

    return nn.ModuleList(
        LayerCache(zeros(number, layer, layer.key_dim), zeros(number, layer, layer.value_dim))
        for number, layer in enumerate(layers)
    )


def _automatic_budget(config: CacheConfig, device: torch.device) -> int:
    free = free_bytes(device)
    if device.type != "cuda":
        return free // 4
    total = torch.cuda.get_device_properties(device).total_memory
    return max(0, free - int(total * (1 - config.gpu_memory_utilization)))
