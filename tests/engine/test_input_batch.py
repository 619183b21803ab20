"""Rows of the input batch: requests enter and leave them, and steps advance them."""

from typing import Any

import numpy as np
import pytest

from compiled_llm.engine.input_batch import InputBatch
from compiled_llm.engine.request import Request
from compiled_llm.engine.sampling_metadata import pack_sampling_params
from compiled_llm.runtime.step.batch_inputs import RECENT
from compiled_llm.sampling_params import SamplingParams

VOCAB_SIZE = 16


def request_of(length: int = 3, *, stops: Any = (), output: Any = (), **params: Any) -> Request:
    sampling_params = SamplingParams(**{"temperature": 0, "max_tokens": 5, **params})
    return Request(
        prompt_token_ids=list(range(1, 1 + length)),
        sampling_params=sampling_params,
        max_tokens=5,
        stop_token_ids=frozenset(stops),
        token_ids=list(output),
    )


@pytest.fixture
def batch() -> InputBatch:
    return InputBatch(max_num_seqs=3, max_model_len=32, vocab_size=VOCAB_SIZE)


def test_a_row_holds_the_tokens_and_counts_of_its_request(batch: InputBatch) -> None:
    request = request_of(4, output=[9, 8])
    batch.add_request(1, request, num_computed_tokens=2)
    assert batch.request(1) is request
    assert batch.running == batch.prefilling == [1]
    assert batch.free == [2, 0]
    assert batch.tokens[1, :6].tolist() == [1, 2, 3, 4, 9, 8]
    assert batch.num_tokens[1] == batch.num_prefill_tokens[1] == 6
    assert batch.num_computed_tokens[1] == 2
    assert batch.num_remaining[1] == 3
    assert batch.max_num_tokens[1] == 9
    assert batch.params[1].tolist() == pack_sampling_params(request).tolist()


def test_a_request_that_leaves_takes_its_tokens_and_times(batch: InputBatch) -> None:
    request, rows = request_of(3), np.array([2])
    batch.add_request(2, request, num_computed_tokens=0)
    batch.append_tokens(rows, np.array([7]), now=1.0)
    batch.append_tokens(rows, np.array([8]), now=2.5)
    assert request.token_ids == []
    assert batch.remove_request(2) is request
    assert request.token_ids == [7, 8]
    assert (request.timings.first_token, request.timings.last_token) == (1.0, 2.5)
    assert (batch.running, batch.prefilling) == ([], [])
    assert sorted(batch.free) == [0, 1, 2]


def test_times_are_those_before_a_preemption(batch: InputBatch) -> None:
    request = request_of(3)
    batch.add_request(0, request, num_computed_tokens=0)
    assert batch.remove_request(0).timings.first_token is None
    request.timings.first_token = 1.0
    batch.add_request(1, request, num_computed_tokens=0)
    batch.append_tokens(np.array([1]), np.array([7]), now=3.0)
    batch.remove_request(1)
    assert (request.timings.first_token, request.timings.last_token) == (1.0, 3.0)


def test_the_generation_changes_with_the_request(batch: InputBatch) -> None:
    generations = [int(batch.generation[0])]
    for _ in range(2):
        batch.add_request(0, request_of(), num_computed_tokens=0)
        generations.append(int(batch.generation[0]))
        batch.remove_request(0)
        generations.append(int(batch.generation[0]))
    assert len(set(generations)) == len(generations)


def test_stop_tokens_are_found_in_all_rows_at_once(batch: InputBatch) -> None:
    for row, stops in enumerate([(), (4, 6), range(30)]):
        batch.add_request(row, request_of(stops=stops), num_computed_tokens=0)
    rows = np.arange(3)
    assert batch.append_tokens(rows, np.array([6, 6, 6]), 0.0).tolist() == [False, True, True]
    assert batch.append_tokens(rows, np.array([4, 5, 9]), 0.0).tolist() == [False, False, True]
    # More stop tokens than the array holds are checked one by one.
    assert batch.needs_host_update.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("options", "needs_update", "logprobs", "host_sampled"),
    [
        ({}, False, False, False),
        ({"logprobs": 0}, True, True, False),
        ({"logits_processors": [lambda ids, logits: logits]}, False, False, True),
    ],
)
def test_flags_follow_the_sampling_params(
    batch: InputBatch,
    options: dict[str, Any],
    needs_update: bool,
    logprobs: bool,
    host_sampled: bool,
) -> None:
    batch.add_request(0, request_of(**options), num_computed_tokens=0)
    assert bool(batch.needs_host_update[0]) == needs_update
    assert bool(batch.has_logprobs[0]) == logprobs
    assert bool(batch.host_sampled[0]) == host_sampled


def test_a_row_decodes_while_tokens_remain(batch: InputBatch) -> None:
    batch.add_request(0, request_of(), num_computed_tokens=0)
    rows, decoding = np.array([0]), []
    for _ in range(5):
        batch.mark_sampled(rows)
        decoding.append(bool(batch.decoding[0]))
    assert decoding == [True] * 4 + [False]


def test_the_cheapest_sampler_serves_all_rows(batch: InputBatch) -> None:
    for row, options in enumerate([{}, {"temperature": 1.0}, {"repetition_penalty": 1.2}]):
        batch.add_request(row, request_of(**options), num_computed_tokens=0)
    samplers = [batch.cheapest_sampler(np.arange(count)) for count in range(4)]
    assert samplers == ["greedy", "greedy", "random", "full"]


def test_sampler_state_is_written_once(batch: InputBatch) -> None:
    batch.add_request(0, request_of(), num_computed_tokens=0)
    batch.add_request(1, request_of(logit_bias={5: 2.0}), num_computed_tokens=0)
    updates = batch.take_sampler_updates()
    assert list(updates) == [1]
    assert updates[1].bias is not None
    assert updates[1].bias[5] == 2.0
    assert batch.take_sampler_updates() == {}


def test_sampler_state_of_a_request_that_left_is_not_written(batch: InputBatch) -> None:
    batch.add_request(1, request_of(logit_bias={5: 2.0}), num_computed_tokens=0)
    batch.remove_request(1)
    assert batch.take_sampler_updates() == {}


def test_stop_tokens_are_banned_until_min_tokens(batch: InputBatch) -> None:
    request, rows, banned = request_of(stops=[4], min_tokens=2), np.array([0]), []
    batch.add_request(0, request, num_computed_tokens=0)
    for _ in range(4):
        batch.lift_stop_token_bans()
        update = batch.take_sampler_updates().get(0)
        banned.append(None if update is None or update.bias is None else update.bias[4])
        batch.mark_sampled(rows)
    assert banned == [-np.inf, None, 0.0, None]


def test_recent_tokens_are_padded_in_front(batch: InputBatch) -> None:
    batch.add_request(0, request_of(2), num_computed_tokens=0)
    batch.add_request(1, request_of(RECENT + 3), num_computed_tokens=0)
    assert batch.recent_tokens(0).tolist() == [-1] * (RECENT - 2) + [1, 2]
    assert batch.recent_tokens(1).tolist() == list(range(4, RECENT + 4))
