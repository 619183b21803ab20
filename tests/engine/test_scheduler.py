"""Tokens of a step: alternation of prompts and decoding rows, and the budget."""

import pytest

from compiled_llm.engine.input_batch import InputBatch
from compiled_llm.engine.kv_cache_manager import KVCacheManager
from compiled_llm.engine.request import Request
from compiled_llm.engine.scheduler import Scheduler
from compiled_llm.engine.scheduler_limits import SchedulerLimits
from compiled_llm.runtime.memory.kv_cache import KVCacheGroup
from compiled_llm.runtime.step.batch_inputs import PrefillBatch
from compiled_llm.sampling_params import SamplingParams
from passes.attention_reach import FULL
from tests.helpers.simulated import VOCAB_SIZE


def test_prompts_of_a_model_with_states_take_turns_with_rows_that_decode() -> None:
    rows = InputBatch(max_num_seqs=4, max_model_len=128, vocab_size=VOCAB_SIZE)
    cache = KVCacheManager(
        [KVCacheGroup(reach=FULL, layers=(0,), num_pages=100)],
        block_size=16,
        max_num_seqs=4,
        max_blocks=8,
        prefix_caching=False,
    )
    limits = SchedulerLimits(
        max_num_batched_tokens=8, prefill_sizes=[8], separate_decode=True, one_sequence_prefill=True
    )
    scheduler = Scheduler(rows, cache, limits)
    for length in (20, 17):
        scheduler.add_request(
            Request(prompt_token_ids=[7] * length, sampling_params=SamplingParams(), max_tokens=20)
        )
    sizes = []
    for _ in range(9):
        output = scheduler.schedule()
        assert output is not None
        sizes.append(
            ("prefill", len(output.batch.ids))
            if isinstance(output.batch, PrefillBatch)
            else ("decode", len(output.rows))
        )
    first = [("prefill", 4), ("prefill", 8), ("prefill", 8)]
    assert sizes == [
        *first,
        ("decode", 1),
        ("prefill", 1),
        ("decode", 1),
        ("prefill", 8),
        ("decode", 1),
        ("prefill", 8),
    ]


@pytest.mark.parametrize(
    ("num_decoding", "lengths", "expected"),
    [
        (0, [16], 16),
        (0, [10], 10),  # no full bucket to prefer
        (0, [17], 16),  # 1 token waits, instead of 47 of padding
        (0, [10, 10], 16),
        (0, [39], 16),
        (0, [40], 40),  # to put 24 off would spare as many
        (0, [60], 60),
        (0, [100], 64),
        (2, [15], 16),
        (16, [30], 46),  # decoding rows alone fill the bucket
        (17, [1], 18),
        (15, [5], 20),  # instead of 1 token in each of 5 steps
        (8, [16], 16),  # 8 tokens, twice
    ],
)
def test_a_full_bucket_is_preferred_to_a_slight_spill(
    num_decoding: int, lengths: list[int], expected: int
) -> None:
    rows = InputBatch(max_num_seqs=32, max_model_len=128, vocab_size=VOCAB_SIZE)
    group = KVCacheGroup(reach=FULL, layers=(0,), num_pages=1000)
    cache = KVCacheManager(
        [group], block_size=16, max_num_seqs=32, max_blocks=8, prefix_caching=False
    )
    limits = SchedulerLimits(
        max_num_batched_tokens=64, prefill_sizes=[16, 64], separate_decode=True
    )
    scheduler = Scheduler(rows, cache, limits)
    for length in [1] * num_decoding:
        scheduler.add_request(
            Request(prompt_token_ids=[7] * length, sampling_params=SamplingParams(), max_tokens=20)
        )
    while num_decoding > rows.decoding.sum():
        assert scheduler.schedule() is not None
    left = sum(lengths)
    for length in lengths:
        scheduler.add_request(
            Request(prompt_token_ids=[7] * length, sampling_params=SamplingParams(), max_tokens=20)
        )
    sizes = []
    while left:
        output = scheduler.schedule()
        assert output is not None
        assert isinstance(output.batch, PrefillBatch)
        sizes.append(len(output.batch.ids))
        left -= int((output.batch.ids >= 0).sum())
    assert sizes[0] == expected
