"""The sizes of the KV cache groups under a budget."""

from typing import Any

import pytest
import torch

from compiled_llm.config.schema import CacheConfig
from compiled_llm.models.discovery import AttentionLayer
from compiled_llm.runtime.limits import Limits
from compiled_llm.runtime.memory import kv_cache
from compiled_llm.runtime.memory.kv_cache import NUM_TRASH_PAGES, plan_groups, trash_groups
from passes.attention_reach import AttentionReach

CPU = torch.device("cpu")
LIMITS = Limits(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=256)
PAGE_BYTES = 16 * 2 * (8 + 8) * 4  # of one layer: 16 tokens, 2 heads of 8 + 8 floats
PAGES = 256 // 16  # of a sequence


def _layer(number: int, window: int = 0) -> AttentionLayer:
    values: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "key_dim": 8, "value_dim": 8}
    values |= {"softcap": 0.0, "sinks": False, "alibi": False, "dtype": torch.float32}
    reach = AttentionReach.decode(window)
    return AttentionLayer(name=f"layers.{number}", reach=reach, **values)


LAYERS = [_layer(0), _layer(1), _layer(2)]
MIXED = [_layer(0, window=32), _layer(1), _layer(2, window=32)]


def test_layers_with_one_window_are_one_group() -> None:
    groups = trash_groups(MIXED)
    assert [group.layers for group in groups] == [(0, 2), (1,)]
    assert {group.num_pages for group in groups} == {NUM_TRASH_PAGES}


def test_enough_memory_holds_all_sequences() -> None:
    (group,) = plan_groups(CacheConfig(memory=10**9), LAYERS, LIMITS, CPU, reserved=0)
    assert group.num_pages == NUM_TRASH_PAGES + 4 * PAGES


def test_a_windowed_group_holds_the_window_and_a_step() -> None:
    windowed, full = plan_groups(CacheConfig(memory=10**9), MIXED, LIMITS, CPU, reserved=0)
    assert full.num_pages == NUM_TRASH_PAGES + 4 * PAGES
    assert windowed.num_pages == NUM_TRASH_PAGES + 4 * ((32 + 32 + 2 * 16) // 16)


def test_the_budget_is_not_exceeded_and_one_sequence_fits() -> None:
    least = (PAGES + NUM_TRASH_PAGES) * PAGE_BYTES * len(LAYERS)
    for budget in (least, least + 5 * PAGE_BYTES * len(LAYERS)):
        (group,) = plan_groups(CacheConfig(memory=budget), LAYERS, LIMITS, CPU, reserved=0)
        assert group.num_pages >= PAGES + NUM_TRASH_PAGES
        assert group.num_pages * PAGE_BYTES * len(LAYERS) <= budget
    with pytest.raises(ValueError, match=r"one sequence of 256 tokens needs .*: lower"):
        plan_groups(CacheConfig(memory=least - 1), LAYERS, LIMITS, CPU, reserved=0)


def test_auto_takes_a_quarter_of_a_cpus_memory_without_the_reserved_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budget = (3 * PAGES + NUM_TRASH_PAGES) * PAGE_BYTES * len(LAYERS)
    monkeypatch.setattr(kv_cache, "free_bytes", lambda device: 4 * (budget + 1000))
    (group,) = plan_groups(CacheConfig(memory="auto"), LAYERS, LIMITS, CPU, reserved=1000)
    assert group.num_pages == NUM_TRASH_PAGES + 3 * PAGES
