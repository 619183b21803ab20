"""Sampling parameters, requests and the block pool."""

import math

import pytest

from compiled_llm.engine.block_pool import BlockPool
from compiled_llm.engine.request import Request
from compiled_llm.engine.sampling_params import SamplingParams

BAD = {
    "temperature": [-0.1, math.nan, math.inf, "hot", True],
    "max_tokens": [0, 1.5, -3],
    "seed": [-1, 2**63, 0.5],
    "stop_token_ids": [("a",)],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_bad_sampling_parameters_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*, got "):
        SamplingParams(**{field: value})


def test_a_request_ends_at_a_stop_or_a_limit() -> None:
    def ends(params: SamplingParams, tokens: list[int], prompt: int = 3) -> tuple[int, str | None]:
        request = Request(prompt_token_ids=[1] * prompt, params=params)
        for token in tokens:
            if request.finish_reason is None:
                request.append(token, eos_token_ids=frozenset({2}), max_model_len=8)
        return len(request.token_ids), request.finish_reason

    tokens = [5, 2, 7, 5, 5, 5, 5, 5]
    assert ends(SamplingParams(), tokens) == (2, "stop")
    assert ends(SamplingParams(ignore_eos=True), tokens) == (5, "length")
    assert ends(SamplingParams(ignore_eos=True, stop_token_ids=(7,)), tokens) == (3, "stop")
    assert ends(SamplingParams(max_tokens=1), tokens) == (1, "length")
    assert ends(SamplingParams(), [5], prompt=3) == (1, None)


def test_the_pool_never_hands_out_the_trash_page_or_a_page_twice() -> None:
    pool = BlockPool(num_pages=10, block_size=16)
    first, second = pool.allocate(4), pool.allocate(5)
    assert sorted(first + second) == list(range(1, 10))
    assert pool.num_free == 0
    pool.free(first)
    assert sorted(pool.allocate(4)) == sorted(first)
    assert [pool.pages_for(n) for n in (1, 16, 17)] == [1, 1, 2]
