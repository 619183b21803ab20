"""How much memory there is, and how much of it the KV cache gets."""

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
    """Layers that see equally far back, and so need and release pages together.

    Attributes:
        reach: the tokens that the layers see.
        layers: their numbers, in call order.
        num_pages: pages of each of their caches, the trash page included.
    """

    reach: AttentionReach
    layers: tuple[int, ...]
    num_pages: int


def trash_groups(layers: list[AttentionLayer]) -> list[KVCacheGroup]:
    """The groups of the layers, with the trash page alone."""
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
    """The groups of the layers, and how many pages each gets; `reserved` bytes are kept free for activations.

    What the budget lacks for all sequences at once is taken from all groups alike.

    Raises:
        ValueError: not even one sequence of `max_model_len` tokens fits.
    """
    groups = trash_groups(layers)
    page_bytes = [
        config.block_size * sum(layers[n].bytes_per_token for n in group.layers) for group in groups
    ]
    a_sequence = [_pages_of_a_sequence(group.reach, config.block_size, limits) for group in groups]
    budget = (
        max(0, _budget(config, device) - reserved) if config.memory == "auto" else config.memory
    )
    least = sum(
        (pages + NUM_TRASH_PAGES) * size for pages, size in zip(a_sequence, page_bytes, strict=True)
    )
    if least > budget:
        raise ValueError(
            f"the KV cache gets {budget / 2**20:.0f} MiB, but one sequence of {limits.max_model_len} tokens needs "
            f"{least / 2**20:.0f} MiB: lower limits.max_model_len or raise cache.memory"
        )
    others = limits.max_num_seqs - 1
    wanted = others * sum(pages * size for pages, size in zip(a_sequence, page_bytes, strict=True))
    spare = min(budget - least, wanted)
    extra = [others * pages * spare // wanted if wanted else 0 for pages in a_sequence]
    if config.memory == "auto" and spare < wanted:
        extra = [_rounded(pages) for pages in extra]
    return [
        replace(g, num_pages=NUM_TRASH_PAGES + p + more)
        for g, p, more in zip(groups, a_sequence, extra, strict=True)
    ]


def _rounded(pages: int) -> int:
    """Less by under 1 %, so that a start that finds a little more or less memory free than the last has the same shapes."""
    return pages >> (shift := max(0, pages.bit_length() - 8)) << shift


def _pages_of_a_sequence(reach: AttentionReach, block_size: int, limits: Limits) -> int:
    """The most pages that one sequence holds at a time: all of it, or its window and a step's tokens."""
    length = limits.max_model_len
    if not reach.is_full:
        length = min(
            length, reach.size + min(limits.max_num_batched_tokens, length) + 2 * block_size
        )
    return -(-length // block_size)


def allocate_caches(
    layers: list[AttentionLayer], groups: list[KVCacheGroup], block_size: int, device: torch.device
) -> nn.ModuleList:
    """One zeroed cache for each attention layer."""
    num_pages = {layer: group.num_pages for group in groups for layer in group.layers}

    def zeros(number: int, layer: AttentionLayer, dim: int) -> torch.Tensor:
        return torch.zeros(
            num_pages[number], block_size, layer.num_kv_heads, dim, dtype=layer.dtype, device=device
        )

    return nn.ModuleList(
        LayerCache(zeros(number, layer, layer.key_dim), zeros(number, layer, layer.value_dim))
        for number, layer in enumerate(layers)
    )


def _budget(config: CacheConfig, device: torch.device) -> int:
    free = free_bytes(device)
    if device.type != "cuda":
        return free // 4
    total = torch.cuda.get_device_properties(device).total_memory
    return max(0, free - int(total * (1 - config.gpu_memory_utilization)))
