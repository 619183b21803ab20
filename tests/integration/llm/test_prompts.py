"""Forms of prompts, and the refusal of invalid ones."""

import math
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from compiled_llm import CompiledLLM, SamplingParams
from compiled_llm.engine.prompts import check_message
from tests.helpers.tiny_models import (
    VOCAB_SIZE,
    Reference,
    greedy,
    prompt_of,
    small_config,
    tiny_model,
)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "prompt 0: the prompt is empty: expected at least one token"),
        (
            [[5], prompt_of(128)],
            (
                "prompt 1: the prompt has 128 tokens, and limits.max_model_len=128 "
                "leaves no room for output"
            ),
        ),
        ([[5], [3, VOCAB_SIZE]], f"prompt 1: token id {VOCAB_SIZE} is out of range"),
        ([[-1]], "prompt 0: token id -1 is out of range"),
        ([[1.5]], "prompt 0: token ids must be whole numbers, got 1.5"),
        ("text", "prompt 0: a text prompt needs a tokenizer, and this model has no tokenizer"),
        ([None], "prompt 0: a prompt must be text or a list of token ids, got NoneType"),
        (None, "prompts must be text, token ids, or a list of these, got NoneType"),
        (5, "prompts must be text, token ids, or a list of these, got 5"),
        (
            b"abc",
            "prompt 0: a prompt must be text or a list of token ids, got bytes: decode it to text",
        ),
        (
            bytearray(b"abc"),
            (
                "prompt 0: a prompt must be text or a list of token ids, got "
                "bytearray: decode it to text"
            ),
        ),
        (
            memoryview(b"abc"),
            (
                "prompt 0: a prompt must be text or a list of token ids, got "
                "memoryview: decode it to text"
            ),
        ),
        (
            [[5], b"abc"],
            "prompt 1: a prompt must be text or a list of token ids, got bytes: decode it to text",
        ),
        (
            {"role": "user", "content": "a"},
            "prompts must be text, token ids, or a list of these, got dict",
        ),
        (
            [{"role": "user", "content": "a"}],
            (
                "prompt 0: a prompt must be text or a list of token ids, got dict: "
                "pass messages as a list"
            ),
        ),
        (
            (prompt for prompt in [[5], [6]]),
            "prompts must be text, token ids, or a list of these, got generator",
        ),
        ({5, 6}, "prompts must be text, token ids, or a list of these, got set"),
        (
            [[5], (token for token in [6])],
            "prompt 1: a prompt must be text or a list of token ids, got generator",
        ),
        ([5, "a"], "prompt 0: token ids must be whole numbers, got 'a'"),
        ([[5], 6], "prompt 1: a prompt must be text or a list of token ids, got int"),
        ([True, False], "prompt 0: a prompt must be text or a list of token ids, got bool"),
        ([[5, True]], "prompt 0: token ids must be whole numbers, got True"),
        ([[[5, 6]]], "prompt 0: token ids must be whole numbers, got [5, 6]"),
        (np.array([5.0, 6.0]), "prompt 0: token ids must be whole numbers, got 5.0"),
        (torch.tensor([True, False]), "prompt 0: token ids must be whole numbers, got True"),
        (
            torch.tensor([[5, 6], [7, 0]]),
            (
                "prompt 0: an array of token ids must have one dimension, got shape "
                "(2, 2): pass a list"
            ),
        ),
        ([np.array(5), np.array([6])], "prompt 0: token ids must be whole numbers, got array([6])"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_bad_prompts_are_refused_and_the_engine_goes_on(
    llm: CompiledLLM, reference: Reference, prompts, message: str
) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the text is compared below
        llm.generate(prompts)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert greedy(llm, [prompt_of(9)], 5) == [reference(prompt_of(9), 5)]


def _scalars(ids: list[int]) -> list[Any]:
    return [np.int64(ids[0]), torch.tensor(ids[1]), *ids[2:]]


def _range(ids: list[int]) -> range:
    return range(ids[0], ids[-1] + 1)


@pytest.mark.parametrize(
    "form", [torch.tensor, np.array, np.uint8, tuple, _range, _scalars, partial(array, "q")]
)
def test_token_ids_come_in_any_sequence_or_array(
    llm: CompiledLLM, form: Callable[[list[int]], Any]
) -> None:
    ids = [5, 6, 7]
    expected = greedy(llm, [ids, ids], 4)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    (alone,) = llm.generate(form(ids), params)
    assert [alone.outputs[0].token_ids] == expected[:1]
    assert alone.prompt_token_ids == ids
    assert {type(token) for token in alone.prompt_token_ids} == {int}
    assert [
        output.outputs[0].token_ids for output in llm.generate([form(ids), form(ids)], params)
    ] == expected


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("x", "got 'x'"),
        (["x", "y"], "got 'x' as conversation 0: use generate() for other prompts"),
        ([5, 6], "got 5 as conversation 0: use generate() for other prompts"),
        ([[5, 6]], "got [5, 6] as conversation 0: use generate() for other prompts"),
        (b"x", "got bytes"),
        (None, "got NoneType"),
        ({"role": "user", "content": "a"}, "got dict"),
        ((entry for entry in [{"role": "user", "content": "a"}]), "got generator"),
        ([[]], "got [] as conversation 0: use generate() for other prompts"),
        (
            [[{"role": "user", "content": "a"}], "x"],
            "got 'x' as conversation 1: use generate() for other prompts",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_conversation_is_refused(llm: CompiledLLM, messages: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the text is compared below
        llm.chat(messages)
    assert (
        str(caught.value) == f"chat() takes a list of messages, or a list of such lists, {message}"
    )
    assert llm.chat([]) == []


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("x", "a message must be a dict with role and content, got 'x'"),
        ({"role": "user"}, "a message must be a dict with role and content, got {'role': 'user'}"),
        (
            {"role": 1, "content": "a"},
            (
                "a message's role must be text, and its content text or a list of "
                "parts, got {'role': 1"
            ),
        ),
        (
            {"role": "user", "content": b"a"},
            "a message's role must be text, and its content text or a list of parts, got",
        ),
    ],
)
def test_what_is_no_message_is_refused(message: Any, expected: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the text is compared below
        check_message(message)
    assert str(caught.value).startswith(expected)
    for content in ("a", None, [{"type": "text", "text": "a"}]):
        check_message({"role": "user", "content": content})


def test_params_must_fit_the_prompts(llm: CompiledLLM) -> None:
    with pytest.raises(ValueError, match="2 prompts were given 3 sampling params"):
        llm.generate([[5], [6]], [SamplingParams()] * 3)
    with pytest.raises(
        ValueError, match="sampling params must be a list with one for each prompt, got dict"
    ):
        llm.generate([[5], [6]], {"max_tokens": 3})  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="priorities must be a list with one for each prompt, got 3"
    ):
        llm.generate([[5], [6]], priority=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompt 0: priority must be a whole number, got True"):
        llm.generate([[5]], priority=[True])
    with pytest.raises(ValueError, match="this model has no tokenizer"):
        llm.stream("text")
    with pytest.raises(ValueError, match="chat needs a tokenizer"):
        llm.chat([{"role": "user", "content": "hi"}])


def test_prompts_may_hold_ids_that_the_model_does_not_generate() -> None:
    """The input embedding of Mllama and Moshi has more rows than the output head."""
    model = tiny_model("llama")
    embedding = torch.nn.Embedding(VOCAB_SIZE + 8, model.config.hidden_size, device=model.device)
    with torch.no_grad():
        embedding.weight[:VOCAB_SIZE] = model.get_input_embeddings().weight
        embedding.weight[VOCAB_SIZE:] = embedding.weight[7]
    model.set_input_embeddings(embedding)
    known, beyond = [5, 7, 9, 7, 11], [5, VOCAB_SIZE + 2, 9, VOCAB_SIZE + 7, 11]
    bans: list[dict[str, Any]] = [
        {},
        {"logit_bias": {11: 5.0}},
        {"min_tokens": 4},
        {"allowed_token_ids": [7, 11]},
    ]
    with CompiledLLM(
        model, None, small_config(compile={"dispatch": "eager"}), progress=False
    ) as llm:
        params = [
            SamplingParams(temperature=0, max_tokens=6, stop_token_ids=[9], **ban) for ban in bans
        ]
        expected = [
            output.outputs[0].token_ids for output in llm.generate([known] * len(params), params)
        ]
        assert [
            output.outputs[0].token_ids for output in llm.generate([beyond] * len(params), params)
        ] == expected
        penalties = SamplingParams(
            temperature=0,
            max_tokens=6,
            repetition_penalty=1.5,
            frequency_penalty=1.0,
            ignore_eos=True,
        )
        assert len(llm.generate(beyond, penalties)[0].outputs[0].token_ids) == 6
        scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
        (of_known,), (of_beyond,) = llm.generate(known, scoring), llm.generate(beyond, scoring)
        assert of_known.prompt_logprobs is not None
        assert of_beyond.prompt_logprobs is not None
        for token, entry, same in zip(
            beyond[1:], of_beyond.prompt_logprobs[1:], of_known.prompt_logprobs[1:], strict=True
        ):
            assert entry is not None
            assert same is not None
            if token < VOCAB_SIZE:
                assert entry == same
            else:
                assert (entry[token].logprob, entry[token].rank) == (-math.inf, VOCAB_SIZE + 1)
                assert len(entry) == 3
        with pytest.raises(
            ValueError,
            match=f"token id {VOCAB_SIZE + 8} is out of range: the model's vocabulary has ids 0 to",
        ):
            llm.generate([VOCAB_SIZE + 8])
        with pytest.raises(
            ValueError,
            match=f"logit_bias: token id {VOCAB_SIZE} is out of range: the model "
            "generates ids 0 to",
        ):
            llm.generate([5], SamplingParams(logit_bias={VOCAB_SIZE: 1.0}))
