"""How much memory there is, and how much of it the KV cache gets."""

import psutil
import torch
from torch import nn

from compiled_llm.config import CacheConfig
from compiled_llm.models.attention import LayerCache
from compiled_llm.models.discovery import AttentionLayer
from compiled_llm.runtime.limits import Limits

NUM_TRASH_PAGES = 1


def used_bytes(device: torch.device) -> int:
    """Memory in use: of the whole GPU as its driver counts it, or of this process on a CPU."""
    if device.type != "cuda":
        return int(psutil.Process().memory_info().rss)
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else int(psutil.virtual_memory().available)


def plan_pages(config: CacheConfig, layers: list[AttentionLayer], limits: Limits, device: torch.device, *, reserved: int) -> int:
    """How many pages the cache has, the trash page included; `reserved` bytes are kept free for activations.

    Raises:
        ValueError: not even one sequence of `max_model_len` tokens fits.
    """
    page_bytes = config.block_size * sum(layer.bytes_per_token for layer in layers)
    a_sequence = -(-limits.max_model_len // config.block_size)
    wanted = limits.max_num_seqs * a_sequence + NUM_TRASH_PAGES
    budget = max(0, _budget(config, device) - reserved) if config.memory == "auto" else config.memory
    pages = min(wanted, budget // page_bytes)
    if pages < a_sequence + NUM_TRASH_PAGES:
        raise ValueError(
            f"the KV cache gets {budget / 2**20:.0f} MiB, but one sequence of {limits.max_model_len} tokens needs "
            f"{(a_sequence + NUM_TRASH_PAGES) * page_bytes / 2**20:.0f} MiB: lower limits.max_model_len or raise cache.memory"
        )
    return pages


def allocate_caches(layers: list[AttentionLayer], num_pages: int, block_size: int, device: torch.device) -> nn.ModuleList:
    """One zeroed cache for each attention layer."""

    def zeros(layer: AttentionLayer, dim: int) -> torch.Tensor:
        return torch.zeros(num_pages, block_size, layer.num_kv_heads, dim, dtype=layer.dtype, device=device)

    return nn.ModuleList(LayerCache(zeros(layer, layer.key_dim), zeros(layer, layer.value_dim)) for layer in layers)


def _budget(config: CacheConfig, device: torch.device) -> int:
    free = free_bytes(device)
    if device.type != "cuda":
        return free // 4
    total = torch.cuda.get_device_properties(device).total_memory
    return max(0, free - int(total * (1 - config.gpu_memory_utilization)))
