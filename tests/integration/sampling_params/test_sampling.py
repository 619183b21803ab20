"""Penalties, bans, truncation and logprobs equal those of transformers."""

from typing import Any

import pytest

from compiled_llm import CompiledLLM, SamplingParams
from compiled_llm.engine.run import run_to_completion
from tests.helpers.byte_model import (
    ASCII,
    BLOCK_SIZE,
    EOS,
    NO_ASCII,
    PAD,
    TOKENIZER,
    VOCAB,
    Reference,
    check_logprobs,
    complete,
    drawn,
    encode,
    greedy,
    tokens_of,
)
from tests.helpers.tiny_models import prompt_of, small_config, tiny_model

pytestmark = pytest.mark.gpu


def test_greedy_options_are_those_of_transformers(llm: CompiledLLM, reference: Reference) -> None:
    """Requests run alone, and together in greater number than rows."""
    prompts = [
        prompt_of(length, seed) for seed, length in enumerate((9, 33, 50, 5, 17, 100, 20, 3))
    ]
    plain = [reference(prompt, 24) for prompt in prompts]
    bias = dict(zip([*plain[2][1:4], 40, 50], [-100.0, -2.5, -0.3, 1.5, 0.8], strict=True))
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        (
            {"logit_bias": bias},
            {"sequence_bias": [[[token], value] for token, value in bias.items()]},
        ),
        ({"allowed_token_ids": ASCII}, {"suppress_tokens": NO_ASCII}),
        (
            {"stop_token_ids": [plain[4][3]], "min_tokens": 10},
            {"eos_token_id": plain[4][3], "min_new_tokens": 10, "pad_token_id": PAD},
        ),
        ({"repetition_penalty": 0.8, "top_k": 3, "top_p": 0.5}, {"repetition_penalty": 0.8}),
        (
            {
                "repetition_penalty": 1.2,
                "allowed_token_ids": ASCII,
                "stop_token_ids": [ASCII[3]],
                "min_tokens": 24,
            },
            {"repetition_penalty": 1.2, "suppress_tokens": [*NO_ASCII, ASCII[3]]},
        ),
        ({"stop_token_ids": plain[7][4:6]}, {"eos_token_id": plain[7][4:6], "pad_token_id": PAD}),
    ]
    expected = [
        reference(prompt, 24, **options)
        for prompt, (_, options) in zip(prompts, cases, strict=True)
    ]
    assert all(
        (tokens == base) == (number == 0)
        for number, (tokens, base) in enumerate(zip(expected, plain, strict=True))
    )
    params = [greedy(**options) for options, _ in cases]
    assert tokens_of(llm, prompts, params) == expected
    for prompt, wanted, tokens in zip(prompts, params, expected, strict=True):
        assert tokens_of(llm, [prompt], wanted) == [tokens]


def test_bad_words(llm: CompiledLLM, reference: Reference) -> None:
    """Words have one or more tokens; the prompt ends with the beginning of one."""
    prompt = encode("Tell me a story, ")
    base = reference(prompt, 24, suppress_tokens=NO_ASCII)
    text = TOKENIZER.decode(base)
    words = [text[4], text[6:9], ", " + text[0], text[10:17]]
    listed = [encode(way) for word in words for way in (word, " " + word.lstrip())]
    expected = reference(prompt, 24, suppress_tokens=NO_ASCII, bad_words_ids=listed)
    assert expected[0] != base[0]
    params = greedy(bad_words=words, allowed_token_ids=ASCII)
    assert tokens_of(llm, [prompt], params) == [expected]
    assert tokens_of(
        llm, [prompt, prompt, prompt_of(60)], [greedy(allowed_token_ids=ASCII), params, greedy()]
    ) == [
        base,
        expected,
        reference(prompt_of(60), 24),
    ]
    output = complete(llm, "Tell me a story, ", params)
    assert not any(word in "Tell me a story, " + output.text for word in words if word != text[4])
    with pytest.raises(
        ValueError, match="bad_words must be at most 64 sequences of at most 8 tokens"
    ):
        llm.generate(prompt, greedy(bad_words=["far too long"]))


def test_bad_words_that_the_model_has_no_tokens_for_are_refused() -> None:
    config = small_config(compile={"dispatch": "eager"})
    with CompiledLLM(tiny_model("llama"), TOKENIZER, config, progress=False) as llm:
        with pytest.raises(ValueError, match="prompt 0: bad_words: token id 163 is out of range"):
            llm.generate(prompt_of(9), greedy(bad_words=["中"]))
        assert len(complete(llm, prompt_of(9), greedy()).token_ids) == 24


def test_logprobs(llm: CompiledLLM, reference: Reference) -> None:
    """Logprobs are the model's for prompts of any length and all ways of sampling."""
    options: list[SamplingParams] = [
        greedy(logprobs=5, prompt_logprobs=3),
        drawn(logprobs=0, prompt_logprobs=20),
        drawn(logprobs=20, top_k=5, temperature=2.0),
        greedy(logprobs=2, prompt_logprobs=0, logit_bias={40: 100.0}),
        greedy(prompt_logprobs=1),
        drawn(logprobs=3, prompt_logprobs=3, repetition_penalty=2.0, max_tokens=1),
        greedy(logprobs=1, max_tokens=20),
        greedy(),
    ]
    prompts = [prompt_of(length, 7) for length in (1, 9, 16, 100, 17, 48, 97, 60)]
    together = llm.generate(prompts, options)
    alone = [
        llm.generate(prompt, wanted)[0] for prompt, wanted in zip(prompts, options, strict=True)
    ]
    for outputs in (together, alone):
        for prompt, wanted, output in zip(prompts, options, outputs, strict=True):
            completion = output.outputs[0]
            assert len(completion.token_ids) == wanted.max_tokens
            logits = reference.logits([*prompt, *completion.token_ids])[:-1]
            assert (completion.logprobs is None) == (wanted.logprobs is None)
            assert (output.prompt_logprobs is None) == (wanted.prompt_logprobs is None)
            if completion.logprobs is not None:
                check_logprobs(
                    completion.logprobs,
                    completion.token_ids,
                    logits[len(prompt) - 1 :],
                    wanted.logprobs or 0,
                )
            if output.prompt_logprobs is not None:
                assert output.prompt_logprobs[0] is None
                check_logprobs(
                    output.prompt_logprobs[1:],
                    prompt[1:],
                    logits[: len(prompt) - 1],
                    wanted.prompt_logprobs or 0,
                )
    assert [output.outputs[0].token_ids for output in together] == [
        output.outputs[0].token_ids for output in alone
    ]
    assert together[3].outputs[0].token_ids == [40] * 24


def test_several_completions(llm: CompiledLLM) -> None:
    """Completions outnumber the rows; the later ones share the blocks of the prompt."""
    llm.reset_prefix_cache()
    prompt = prompt_of(40)
    params = drawn(n=6, seed=2**63 - 3, logprobs=2)
    (group,) = llm._runner.make_groups([prompt], params, None, streaming=False)
    for _ in run_to_completion(llm.engine, [group]):
        pass
    assert [request.num_cached_tokens for request in group.requests] == [0] + [2 * BLOCK_SIZE] * 5
    (output,) = llm.generate([prompt], params)
    assert [completion.index for completion in output.outputs] == list(range(6))
    assert output.finished
    assert output.usage == {"prompt_tokens": 40, "completion_tokens": 72, "total_tokens": 112}
    drawn_alone = [
        complete(llm, prompt, drawn(seed=(2**63 - 3 + number) % 2**63, logprobs=2))
        for number in range(6)
    ]
    assert [completion.token_ids for completion in output.outputs] == [
        completion.token_ids for completion in drawn_alone
    ]
    assert [request.token_ids for request in group.requests] == [
        completion.token_ids for completion in drawn_alone
    ]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 6
    mixed = llm.generate([prompt_of(9), prompt, prompt_of(50)], [drawn(n=2), params, greedy()])
    assert [len(output.outputs) for output in mixed] == [2, 6, 1]
    assert [completion.token_ids for completion in mixed[1].outputs] == [
        completion.token_ids for completion in drawn_alone
    ]


def test_defaults(llm: CompiledLLM) -> None:
    assert llm.default_sampling_params == SamplingParams()
    (output,) = llm.generate("Tell me: ")
    assert len(output.outputs) == 1
    assert len(output.outputs[0].token_ids) <= 16


def test_defaults_of_a_checkpoint(reference: Reference) -> None:
    model, prompt = tiny_model("llama", vocab_size=VOCAB), prompt_of(9)
    expected = reference(prompt, 12, repetition_penalty=1.3)
    config = model.generation_config
    config.temperature, config.top_k, config.top_p, config.min_p = 0.0, 7, 0.9, 0.05
    config.repetition_penalty, config.max_new_tokens, config.eos_token_id = (
        1.3,
        12,
        [EOS, expected[5]],
    )
    with CompiledLLM(
        model, None, small_config(compile={"dispatch": "eager"}), progress=False
    ) as llm:
        options = {
            "temperature": 0.0,
            "top_k": 7,
            "top_p": 0.9,
            "min_p": 0.05,
            "repetition_penalty": 1.3,
            "max_tokens": 12,
        }
        assert llm.default_sampling_params == SamplingParams(**options)
        (output,) = llm.generate(prompt)
        assert output.outputs[0].token_ids == expected[: expected.index(expected[5]) + 1]
        assert output.outputs[0].finish_reason == "stop"
        assert tokens_of(llm, [prompt], SamplingParams(ignore_eos=True, **options)) == [expected]
        with pytest.raises(ValueError, match="stop strings need a tokenizer"):
            llm.generate(prompt, greedy(stop="a"))
        with pytest.raises(ValueError, match="bad_words need a tokenizer"):
            llm.generate(prompt, greedy(bad_words=["a"]))
