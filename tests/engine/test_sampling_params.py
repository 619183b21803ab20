"""Sampling parameters: validation, normalization, and the sampler that serves them."""

import dataclasses
import math
import pickle
from typing import Any

import pytest
from transformers import GenerationConfig, MinPLogitsWarper

from compiled_llm.engine.request import Request
from compiled_llm.engine.request_validation import validate
from compiled_llm.sampling_params import MAX_LOGPROBS, SamplingParams

NO_NUMBERS = [math.nan, math.inf, -math.inf, "hot", True, None, 10**400]
BAD: dict[str, list[Any]] = {
    "n": [0, -1, 1.5, True, None, 2**31],
    "temperature": [-0.1, 1e300, *NO_NUMBERS],
    "top_k": [-2, 1.0, True, None, 2**31],
    "top_p": [0, -0.5, 1.1, *NO_NUMBERS],
    "min_p": [-0.1, 1.1, *NO_NUMBERS],
    "presence_penalty": [-2.1, 2.1, *NO_NUMBERS],
    "frequency_penalty": [-2.1, 2.1, *NO_NUMBERS],
    "repetition_penalty": [0, -1, 1e-300, *NO_NUMBERS],
    "seed": [-1, 2**63, 0.5, True],
    "max_tokens": [0, 1.5, -3, True],
    "min_tokens": [-1, 1.5, True, None, 17],
    "stop": ["", ["a", ""], [1], 7, b"a"],
    "stop_token_ids": [
        ("a",),
        [1.0],
        [True],
        [-1],
        [2**31],
        "12",
        b"12",
        bytearray(b"12"),
        5,
        None,
    ],
    "ignore_eos": [1, None, "yes"],
    "include_stop_str_in_output": [0],
    "skip_special_tokens": ["no"],
    "logprobs": [-1, MAX_LOGPROBS + 1, True, 1.0],
    "prompt_logprobs": [-1, MAX_LOGPROBS + 1, True],
    "logit_bias": [
        {"1": 1.0},
        {-1: 1.0},
        {True: 1.0},
        {1: math.nan},
        {1: math.inf},
        {1: None},
        [(1, 1.0)],
    ],
    "allowed_token_ids": [[], ["a"], [-1], [True], 3, b"12", bytearray(b"12"), memoryview(b"12")],
    "bad_words": ["word", [""], [3], None],
    "logits_processors": [[3], len, None],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD.items() for value in values]
)
def test_bad_sampling_parameters_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be .*, got ") as caught:
        SamplingParams(**{field: value})
    assert "\n" not in str(caught.value)


def test_bad_combinations_are_refused() -> None:
    with pytest.raises(ValueError, match="min_tokens must be at most max_tokens=3, got 4"):
        SamplingParams(min_tokens=4, max_tokens=3)
    with pytest.raises(ValueError, match="n must be 1 when temperature is 0, got 2"):
        SamplingParams(n=2, temperature=0)
    assert SamplingParams(min_tokens=1000, max_tokens=None).max_tokens is None


def _check(stop: set[int], words: list[list[int]], **params: Any) -> None:
    """Validate a request of the prompt 5, 6 in a vocabulary of 8 tokens."""
    request = Request(
        prompt_token_ids=[5, 6],
        sampling_params=SamplingParams(**params),
        stop_token_ids=frozenset(stop),
        bad_words=words,
        max_tokens=4,
    )
    validate(request, vocab_size=8, max_model_len=16)


@pytest.mark.parametrize(
    ("stop", "words", "params", "message"),
    [
        (
            {2},
            [],
            {"allowed_token_ids": [2], "min_tokens": 2},
            "allowed_token_ids and min_tokens=2: allow other tokens or set",
        ),
        (
            {2, 7},
            [],
            {"allowed_token_ids": [7, 2, 2], "min_tokens": 1},
            "allowed_token_ids and min_tokens=1: allow other",
        ),
        (
            {*range(9)},
            [],
            {"min_tokens": 1},
            "min_tokens=1: set min_tokens=0 or fewer stop tokens (or ignore_eos=True)",
        ),
        (
            set(),
            [[3], [4]],
            {"allowed_token_ids": [3, 4]},
            "allowed_token_ids and bad_words: allow other tokens or ban fewer words",
        ),
        (set(), [[n] for n in range(8)], {"logit_bias": {3: 100.0}}, "bad_words: ban fewer words"),
        (
            {2},
            [[n] for n in range(8) if n != 2],
            {"min_tokens": 1},
            "bad_words and min_tokens=1: ban fewer words or set",
        ),
        (
            {2},
            [[3]],
            {"allowed_token_ids": [2, 3], "min_tokens": 1},
            "allowed_token_ids and bad_words and min_tokens=1: allow",
        ),
        (
            set(),
            [[5, 6, 3]],
            {"allowed_token_ids": [3]},
            "allowed_token_ids and bad_words: allow other tokens or ban fewer words",
        ),
    ],
)
def test_parameters_that_ban_every_token_are_refused(
    stop: set[int], words: list[list[int]], params: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=r"^no token is left to generate under ") as caught:
        _check(stop, words, **params)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stop", "words", "params"),
    [
        ({2}, [], {"allowed_token_ids": [2]}),
        ({2}, [], {"allowed_token_ids": [2, 3], "min_tokens": 4}),
        ({*range(7)}, [], {"min_tokens": 1}),
        (set(), [[n] for n in range(7)], {}),
        (set(), [[6, 5, 3], [5, 3], [7, 4, 5, 6, 3]], {"allowed_token_ids": [3]}),
        (set(), [], {"logit_bias": dict.fromkeys(range(8), -1000.0), "min_tokens": 2}),
    ],
)
def test_parameters_that_leave_a_token_are_served(
    stop: set[int], words: list[list[int]], params: dict[str, Any]
) -> None:
    _check(stop, words, **params)


def test_every_field_has_a_bad_value_here() -> None:
    assert {field.name for field in dataclasses.fields(SamplingParams)} == BAD.keys()


def test_values_are_kept_in_one_form() -> None:
    bias = {5: 1, 6: -1000.0, 7: 1000}
    params = SamplingParams(
        top_k=-1,
        stop="end",
        stop_token_ids=[1, 2],
        logit_bias=bias,
        allowed_token_ids=range(3),
        bad_words=["no"],
    )
    assert (params.top_k, params.stop, params.stop_token_ids) == (0, ("end",), (1, 2))
    assert (params.allowed_token_ids, params.bad_words) == ((0, 1, 2), ("no",))
    assert params.logit_bias == {5: 1, 6: -100.0, 7: 100.0}
    bias.clear()
    assert params.logit_bias
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams().stop == ()
    assert SamplingParams(max_tokens=None).max_tokens is None


def test_records_are_immutable_comparable_and_travel() -> None:
    params = SamplingParams(logit_bias={1: 2.0}, stop=["a"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    assert dataclasses.replace(params) == pickle.loads(pickle.dumps(params)) == params
    assert hash(params) == hash(dataclasses.replace(params))
    assert params != SamplingParams(stop=["a"])


@pytest.mark.parametrize(
    "field",
    [
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {1: 1.0}},
        {"allowed_token_ids": [1]},
        {"bad_words": ["a"]},
        {"logprobs": 0},
        {"logits_processors": [MinPLogitsWarper(0.1)]},
        {"min_tokens": 1},
    ],
)
@pytest.mark.parametrize("temperature", [0, 0.5])
def test_what_looks_at_logits_needs_the_full_sampler(
    temperature: float, field: dict[str, Any]
) -> None:
    assert SamplingParams(temperature=temperature, **field).sampler == "full"


def test_the_cheapest_sampler_is_chosen() -> None:
    truncating: list[dict[str, Any]] = [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}]
    for field in truncating:
        assert SamplingParams(temperature=0, **field).sampler == "greedy"
        assert SamplingParams(**field).sampler == "full"
    harmless: dict[str, Any] = {
        "prompt_logprobs": 5,
        "stop": "a",
        "stop_token_ids": [1],
        "top_k": -1,
        "logit_bias": {},
        "seed": 1,
    }
    assert SamplingParams(temperature=0, **harmless).sampler == "greedy"
    assert SamplingParams(**harmless).sampler == "random"


def test_a_generation_config_gives_what_it_sets() -> None:
    from_config = SamplingParams.from_generation_config
    assert (
        from_config(None)
        == from_config(GenerationConfig())
        == from_config(GenerationConfig(do_sample=True))
        == SamplingParams()
    )
    config = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        min_p=0.05,
        repetition_penalty=1.1,
        max_new_tokens=99,
        num_beams=4,
    )
    expected = SamplingParams(
        temperature=0.6, top_k=20, top_p=0.95, min_p=0.05, repetition_penalty=1.1, max_tokens=99
    )
    assert from_config(config) == expected
    assert from_config(config, top_k=0, seed=7) == dataclasses.replace(expected, top_k=0, seed=7)
    assert from_config(GenerationConfig(do_sample=False)) == SamplingParams(temperature=0)
    assert from_config(GenerationConfig(do_sample=False), temperature=0.5) == SamplingParams(
        temperature=0.5
    )
    with pytest.raises(TypeError, match="top_q"):
        from_config(None, top_q=1)
