"""Sampling options through the Python API, measured by transformers' `generate` with the same options and by its logits."""

import copy
import string
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TextStreamer,
    TopKLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from compiled_llm import CompiledLLM, SamplingParams
from compiled_llm.engine.run import run_to_completion
from compiled_llm.outputs import CompletionOutput, Logprob
from tests.conftest import DEVICE
from tests.helpers.tiny_models import prompt_of, small_config, tiny_model

pytestmark = pytest.mark.gpu

VOCAB = 264
PAD, BOS, EOS = range(3)
PAGE = 16


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>"]
    backend = Tokenizer(
        models.BPE(
            vocab={name: number for number, name in enumerate([*specials, *alphabet])}, merges=[]
        )
    )
    backend.add_special_tokens([AddedToken(name, special=True) for name in specials])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


TOKENIZER = byte_tokenizer()


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return ids


ASCII = encode(string.ascii_letters + string.digits + " .,!?")
NO_ASCII = [token for token in range(VOCAB) if token not in ASCII]


class Reference:
    """transformers' own generation and logprobs, with eager attention, one prompt at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = copy.deepcopy(model)
        self._model.set_attn_implementation("eager")

    def __call__(self, prompt: Sequence[int], num_tokens: int, **options: Any) -> list[int]:
        ids = torch.tensor([list(prompt)], device=DEVICE)
        options = {
            "do_sample": False,
            "eos_token_id": None,
            "attention_mask": torch.ones_like(ids),
            **options,
        }
        tokens: list[int] = self._model.generate(ids, max_new_tokens=num_tokens, **options)[
            0, len(prompt) :
        ].tolist()
        return tokens

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """[L, V] what each of the tokens says of the next."""
        logits: Tensor = self._model(torch.tensor([list(ids)], device=DEVICE)).logits[0].cpu()
        return logits


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(tiny_model("llama", vocab_size=VOCAB))


@pytest.fixture(scope="module", params=["eager", "compiled"])
def llm(request: pytest.FixtureRequest) -> Iterator[CompiledLLM]:
    buckets = {"decode": [4], "prefill": [48], "samplers": ["full", "scoring"]}
    changes: dict[str, Any] = (
        {"compile": {"dispatch": "eager"}} if request.param == "eager" else {"buckets": buckets}
    )
    with CompiledLLM(
        tiny_model("llama", vocab_size=VOCAB), TOKENIZER, small_config(**changes), progress=False
    ) as engine:
        free = engine.engine.cache.num_free_blocks
        yield engine
        engine.engine.cache.check()
        assert engine.engine.cache.num_free_blocks == free
        if request.param == "compiled":
            assert not engine.report().fallbacks


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **options})


def drawn(**options: Any) -> SamplingParams:
    return SamplingParams(**{"seed": 5, "max_tokens": 12, "ignore_eos": True, **options})


def complete(llm: CompiledLLM, prompt: Any, params: SamplingParams) -> CompletionOutput:
    (output,) = llm.generate([prompt], params)
    return output.outputs[0]


def tokens_of(llm: CompiledLLM, prompts: Sequence[Sequence[int]], params: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(list(prompts), params)]


class Force:
    """A logits processor that makes the tokens after the prompt these ones."""

    def __init__(self, prompt: Sequence[int], tokens: Sequence[int]) -> None:
        self._start, self._tokens = len(prompt), tokens

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        forced = torch.full_like(logits, float("-inf"))
        forced[:, self._tokens[(ids.shape[1] - self._start) % len(self._tokens)]] = 0
        return forced


def spoken(
    llm: CompiledLLM, text: str, *, tokens: Sequence[int] | None = None, **options: Any
) -> CompletionOutput:
    """The completion of a request that is made to say the text."""
    tokens, prompt = tokens or encode(text), "Say: "
    force = Force(encode(prompt), tokens)
    return complete(
        llm, prompt, greedy(logits_processors=[force], **{"max_tokens": len(tokens), **options})
    )


def test_greedy_options_are_those_of_transformers(llm: CompiledLLM, reference: Reference) -> None:
    """Alone, and together in more requests than there are rows."""
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
    """Of one token and of many, one of them begun by the prompt."""
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


def check_logprobs(
    found: Sequence[dict[int, Logprob] | None], tokens: Sequence[int], logits: Tensor, count: int
) -> None:
    """Of each token, and of the `count` most likely ones, under these logits [L, V]."""
    assert len(found) == len(tokens) == len(logits)
    for entry, token, logprobs in zip(found, tokens, logits.double().log_softmax(-1), strict=True):
        assert entry is not None
        assert next(iter(entry)) == token
        ranked = logprobs.sort(descending=True).values
        for number, logprob in entry.items():
            expected = pytest.approx(logprob.logprob, rel=1e-4, abs=1e-5)
            assert (logprobs[number].item(), ranked[logprob.rank - 1].item()) == (
                expected,
                expected,
            )
            assert logprob.decoded_token == TOKENIZER.decode([number])
        ranks = [logprob.rank for logprob in entry.values()]
        assert sorted(ranks) == sorted({*range(1, count + 1), ranks[0]})


def test_logprobs(llm: CompiledLLM, reference: Reference) -> None:
    """Of prompts shorter and longer than a page and a step, of tokens drawn in any way: always the model's own."""
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


STOPS = [
    ("Hello world, hello", ["world"]),
    ("Hello world, hello", ["o", "lo w"]),
    ("Hello world, hello", ["hello"]),
    ("Hello world, hello", ["nothing of the kind"]),
    ("Hello", ["Hello"]),
    ("so 🙂🙃 nice", ["🙃"]),
    ("so 🙂🙃 nice", ["🙂🙃 n", "very"]),
    ("早上好。世界。今天天气很好。", ["。今"]),
    ("早上好。世界。今天天气很好。", ["天天"]),
    ("naïve café 👩‍👩‍👧", ["fé 👩\u200d"]),
    ("aaab", ["aab"]),
]


@pytest.mark.parametrize(("text", "stops"), STOPS)
def test_stop_strings(llm: CompiledLLM, text: str, stops: list[str]) -> None:
    """They end within any of the bytes of a character, each of which is a token."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    end, start = min(found, default=(len(text), len(text)))
    reason = "stop" if found else "length"
    for include in (False, True):
        output = spoken(llm, text, stop=stops, include_stop_str_in_output=include, logprobs=1)
        assert output.text == text[: end if include else start]
        assert output.token_ids == encode(text[:end])
        assert output.finish_reason == reason
        assert output.logprobs is not None
        assert len(output.logprobs) == len(output.token_ids)
    pieces = llm.stream(
        "Say: ",
        greedy(logits_processors=[Force(encode("Say: "), encode(text))], stop=stops, max_tokens=50),
    )
    assert "".join(pieces) == (
        text[:start] if found else (text * 50).encode()[:50].decode(errors="ignore")
    )


def test_stop_strings_of_tokens_chosen_in_the_graph(llm: CompiledLLM, reference: Reference) -> None:
    """The step that runs ahead of the end leaves nothing behind; others in the batch go on."""
    prompt = encode("One, two, ")
    expected = reference(prompt, 24, suppress_tokens=NO_ASCII)
    text = TOKENIZER.decode(expected)
    stop = text[6:9]
    end = text.find(stop) + 3
    params = [
        greedy(allowed_token_ids=ASCII, stop=stop, min_tokens=least) for least in (0, end, 24)
    ]
    first, later, never, other = llm.generate([prompt] * 3 + [prompt_of(30)], [*params, greedy()])
    assert (first.text, first.outputs[0].token_ids) == (text[: end - 3], expected[:end])
    again = text.find(stop, end - 2)
    assert later.text == (text if again < 0 else text[:again])
    assert (never.text, never.outputs[0].token_ids) == (text, expected)
    assert [output.outputs[0].finish_reason for output in (first, never, other)] == [
        "stop",
        "length",
        "length",
    ]
    assert other.outputs[0].token_ids == reference(prompt_of(30), 24)


def test_stopping_tokens(llm: CompiledLLM) -> None:
    a, b, c = encode("abc")
    said = [a, BOS, b, EOS, c, c]
    output = spoken(llm, "", tokens=said, ignore_eos=False)
    assert (output.text, output.token_ids, output.finish_reason) == ("ab", said[:4], "stop")
    output = spoken(llm, "", tokens=said)
    assert (output.text, output.token_ids, output.finish_reason) == ("abcc", said, "length")
    output = spoken(llm, "", tokens=said, skip_special_tokens=False)
    assert (output.text, output.token_ids, output.finish_reason) == ("a<s>b</s>cc", said, "length")
    output = spoken(llm, "", tokens=said, stop="</s>c", skip_special_tokens=False)
    assert (output.text, output.token_ids, output.finish_reason) == ("a<s>b", said[:5], "stop")
    output = spoken(
        llm,
        "",
        tokens=said,
        stop_token_ids=[BOS],
        skip_special_tokens=False,
        include_stop_str_in_output=True,
    )
    assert (output.text, output.token_ids, output.finish_reason) == ("a<s>", said[:2], "stop")
    output = spoken(llm, "", tokens=said, stop_token_ids=range(3, VOCAB), ignore_eos=True)
    assert (output.token_ids, output.finish_reason) == (said[:1], "stop")
    output = spoken(llm, "", tokens=said, stop_token_ids=[c], max_tokens=5)
    assert (output.token_ids, output.finish_reason) == (
        said[:5],
        "stop",
    )  # both at once: it has come to an end


def test_several_completions(llm: CompiledLLM) -> None:
    """More than there are rows; the later ones share the pages of the prompt."""
    llm.reset_prefix_cache()
    prompt = prompt_of(40)
    params = drawn(n=6, seed=2**63 - 3, logprobs=2)
    (job,) = llm._runner.make_groups([prompt], params, None, streaming=False)
    for _ in run_to_completion(llm.engine, [job]):
        pass
    assert [request.num_cached_tokens for request in job.requests] == [0] + [2 * PAGE] * 5
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
    assert [request.token_ids for request in job.requests] == [
        completion.token_ids for completion in drawn_alone
    ]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 6
    mixed = llm.generate([prompt_of(9), prompt, prompt_of(50)], [drawn(n=2), params, greedy()])
    assert [len(output.outputs) for output in mixed] == [2, 6, 1]
    assert [completion.token_ids for completion in mixed[1].outputs] == [
        completion.token_ids for completion in drawn_alone
    ]


def test_logits_processors_of_transformers(llm: CompiledLLM) -> None:
    words = [[40, 50], encode("e"), [30, 31, 32]]
    repetition, bans = RepetitionPenaltyLogitsProcessor(1.4), NoBadWordsLogitsProcessor(words)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(10)])
    pairs = [
        (greedy(logits_processors=[repetition]), greedy(repetition_penalty=1.4)),
        (
            greedy(logits_processors=[bans, repetition]),
            greedy(logits_processors=[bans], repetition_penalty=1.4),
        ),
        (drawn(logits_processors=warpers), drawn(temperature=0.7, top_k=10)),
        (drawn(logits_processors=warpers, min_p=0.1), drawn(temperature=0.7, top_k=10, min_p=0.1)),
    ]
    for prompt in (prompt_of(9), prompt_of(70)):
        for outside, inside in pairs:
            assert tokens_of(llm, [prompt], outside) == tokens_of(llm, [prompt], inside)
        together = tokens_of(llm, [prompt] * 8, [params for pair in pairs for params in pair])
        assert together[::2] == together[1::2]


def test_what_a_logits_processor_is_given(llm: CompiledLLM, reference: Reference) -> None:
    """All ids so far and the model's own logits, which it may write to; logprobs stay the model's."""
    prompt, seen = prompt_of(70), []

    def record(ids: Tensor, logits: Tensor) -> Tensor:
        seen.append((ids.clone(), logits.clone()))
        logits[:, logits.argmax()] = -100.0
        return logits

    others = [drawn(logprobs=2), greedy(repetition_penalty=1.3), drawn(n=2)]
    prompts = [prompt_of(20), prompt_of(33), prompt_of(5)]
    before = llm.report().scheduling.processor_calls
    expected = llm.generate(prompts, others)
    assert llm.report().scheduling.processor_calls == before
    mixed = llm.generate(
        [*prompts, prompt], [*others, greedy(logits_processors=[record], logprobs=3)]
    )
    output = mixed.pop().outputs[0]
    assert llm.report().scheduling.processor_calls == before + 24 == before + len(seen)
    assert [[each.token_ids for each in other.outputs] for other in mixed] == [
        [e.token_ids for e in o.outputs] for o in expected
    ]
    everything = [*prompt, *output.token_ids]
    logits = reference.logits(everything)[len(prompt) - 1 : -1]
    for number, (ids, given) in enumerate(seen):
        assert ids.dtype == torch.int64
        assert ids.tolist() == [everything[: len(prompt) + number]]
        torch.testing.assert_close(given[0].cpu(), logits[number], rtol=1e-4, atol=1e-5)
    assert output.token_ids == logits.topk(2).indices[:, 1].tolist()
    assert output.logprobs is not None
    check_logprobs(output.logprobs, output.token_ids, logits, 3)


def test_a_failing_logits_processor_ends_its_request_alone(
    llm: CompiledLLM, reference: Reference
) -> None:
    prompt = prompt_of(20)

    def fails(ids: Tensor, logits: Tensor) -> Tensor:
        if ids.shape[1] == len(prompt) + 3:
            raise KeyError("nothing found")
        return logits

    faults: list[Any] = [
        fails,
        lambda _, logits: logits[0],
        lambda _, logits: logits[:, :-1],
        lambda _, logits: None,
    ]
    errors = [
        "KeyError: 'nothing found'",
        *(
            f"ValueError: a logits processor must return logits of shape (1, {VOCAB}), got {got}"
            for got in (f"({VOCAB},)", f"(1, {VOCAB - 1})", "NoneType")
        ),
    ]
    params = [greedy(logits_processors=[fault]) for fault in faults]
    *failed, good = llm.generate([prompt] * 5, [*params, greedy()])
    expected = reference(prompt, 24)
    assert good.outputs[0].token_ids == expected
    for output, error in zip(failed, errors, strict=True):
        assert (output.outputs[0].finish_reason, output.outputs[0].error) == ("error", error)
    assert [output.outputs[0].token_ids for output in failed] == [expected[:3], [], [], []]
    assert failed[0].text == TOKENIZER.decode(expected[:3]).rstrip("\ufffd")
    assert tokens_of(llm, [prompt], greedy()) == [expected]


class Recorder(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.given: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.given.append(value.tolist())

    def end(self) -> None:
        self.given.append("end")


def test_streamers_of_transformers(llm: CompiledLLM, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "Tell me: "
    params = greedy(allowed_token_ids=ASCII, stop="\n")
    expected = complete(llm, prompt, params)
    recorder = Recorder()
    (output,) = llm.generate(prompt, params, streamer=recorder)
    assert output.outputs[0].token_ids == expected.token_ids
    assert recorder.given == [[encode(prompt)], *([token] for token in expected.token_ids), "end"]
    pieces = TextIteratorStreamer(TOKENIZER, skip_prompt=True)
    llm.generate(prompt, params, streamer=pieces)
    assert "".join(pieces) == output.text == expected.text
    llm.generate(prompt, params, streamer=TextStreamer(TOKENIZER))
    assert capsys.readouterr().out == prompt + expected.text + "\n"
    for prompts, wanted in (
        ([prompt, prompt], params),
        ([prompt], drawn(n=2)),
        ([prompt], [drawn(n=2)]),
    ):
        with pytest.raises(
            ValueError, match="a streamer takes one completion of one prompt, got 2"
        ):
            llm.generate(prompts, wanted, streamer=recorder)


def test_outputs_say_what_they_cost(llm: CompiledLLM) -> None:
    (output,) = llm.generate("Tell me: ", greedy())
    completion = output.outputs[0]
    assert (output.prompt, output.prompt_token_ids) == ("Tell me: ", encode("Tell me: "))
    assert output.usage == {"prompt_tokens": 9, "completion_tokens": 24, "total_tokens": 33}
    assert (completion.index, completion.finish_reason, completion.error, completion.logprobs) == (
        0,
        "length",
        None,
        None,
    )
    metrics = completion.metrics
    assert metrics is not None
    assert None not in (
        metrics.queue,
        metrics.time_to_first_token,
        metrics.time_per_output_token,
        metrics.total,
    )
    assert 0 <= metrics.queue < metrics.time_to_first_token < metrics.total < 60
    assert metrics.time_per_output_token * 23 == pytest.approx(
        metrics.total - metrics.time_to_first_token
    )
    queues = [
        output.outputs[0].metrics.queue for output in llm.generate([prompt_of(9)] * 5, greedy())
    ]
    assert max(queues) == queues[4]
    single = complete(llm, "Tell me: ", greedy(max_tokens=1)).metrics
    assert single is not None
    assert single.time_per_output_token is None
    assert single.total == single.time_to_first_token


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


def test_nothing_is_lost_where_requests_make_room() -> None:
    """Penalties, bans, logprobs, text and processors of requests that are computed again are those of requests that are not."""
    stops, prompts = (
        encode("ab"),
        [prompt_of(length, 3) for length in (60, 45, 10, 50, 70, 30, 14, 33)],
    )
    params = [
        drawn(
            max_tokens=40,
            repetition_penalty=1.2,
            presence_penalty=0.5,
            frequency_penalty=0.2,
            logprobs=2,
        ),
        greedy(max_tokens=40, bad_words=["e", "th", "abc", "."], prompt_logprobs=2, logprobs=1),
        greedy(
            max_tokens=40, min_tokens=30, stop_token_ids=stops, logit_bias=dict.fromkeys(stops, 3.0)
        ),
        drawn(max_tokens=40, allowed_token_ids=ASCII, stop="zz", top_k=20, prompt_logprobs=0),
        greedy(max_tokens=40, frequency_penalty=2.0),
        greedy(
            max_tokens=40,
            logits_processors=[RepetitionPenaltyLogitsProcessor(1.5)],
            presence_penalty=1.0,
            logprobs=3,
        ),
        drawn(max_tokens=40, n=2, min_p=0.02, min_tokens=40, stop_token_ids=range(200)),
        drawn(max_tokens=40, temperature=3.0),
    ]
    found = []
    for memory in ("auto", 13 * PAGE * 2 * 2 * 2 * 16 * 4):
        config = small_config(compile={"dispatch": "eager"}, cache={"memory": memory})
        with CompiledLLM(
            tiny_model("llama", vocab_size=VOCAB), TOKENIZER, config, progress=False
        ) as llm:
            found.append(llm.generate(prompts, params))
            assert (llm.report().scheduling.preemptions > 2) == (memory != "auto")
            llm.engine.cache.check()
    for ample, tight in zip(*found, strict=True):
        assert flat(ample.prompt_logprobs or []) == pytest.approx(
            flat(tight.prompt_logprobs or []), rel=1e-4
        )
        for one, other in zip(ample.outputs, tight.outputs, strict=True):
            assert (one.token_ids, one.text, one.finish_reason) == (
                other.token_ids,
                other.text,
                other.finish_reason,
            )
            assert flat(one.logprobs or []) == pytest.approx(flat(other.logprobs or []), rel=1e-4)


def flat(logprobs: Sequence[dict[int, Logprob] | None]) -> list[float]:
    return [
        value
        for entry in logprobs
        for token, logprob in (entry or {}).items()
        for value in (token, logprob.logprob)
    ]


def test_bad_words_that_the_model_has_no_tokens_for_are_refused() -> None:
    config = small_config(compile={"dispatch": "eager"})
    with CompiledLLM(tiny_model("llama"), TOKENIZER, config, progress=False) as llm:
        with pytest.raises(ValueError, match="prompt 0: bad_words: token id 163 is out of range"):
            llm.generate(prompt_of(9), greedy(bad_words=["中"]))
        assert len(complete(llm, prompt_of(9), greedy()).token_ids) == 24
