"""The Python API around a model that the user holds: lifecycle, batches, and input that is refused."""

import math
import threading
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from compiled_llm import CompiledLLM, SamplingParams
from compiled_llm.engine.prompts import check_message
from compiled_llm.engine.run import run_to_completion
from compiled_llm.errors import QueueFullError
from tests.helpers.tiny_models import (
    VOCAB_SIZE,
    Reference,
    greedy,
    prompt_of,
    small_config,
    tiny_model,
)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(tiny_model("llama"))


@pytest.fixture(scope="module")
def llm() -> Iterator[CompiledLLM]:
    config = small_config(
        buckets={"decode": [4], "prefill": [48], "samplers": ["greedy", "random"]}
    )
    with CompiledLLM(tiny_model("llama"), None, config, progress=False) as engine:
        yield engine


def test_one_prompt_or_many_with_one_or_many_params(llm: CompiledLLM, reference: Reference) -> None:
    (single,) = llm.generate(
        prompt_of(9), SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    )
    assert single.prompt is None
    assert single.prompt_token_ids == prompt_of(9)
    assert single.outputs[0].token_ids == reference(prompt_of(9), 5)
    assert (single.outputs[0].finish_reason, single.text) == ("length", "")
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 7)]
    first, second = llm.generate([prompt_of(9), prompt_of(20)], params)
    assert first.outputs[0].token_ids == reference(prompt_of(9), 3)
    assert second.outputs[0].token_ids == reference(prompt_of(20), 7)
    assert llm.generate([]) == []


def test_requests_stop_at_stop_tokens_and_at_the_length_limit(
    llm: CompiledLLM, reference: Reference
) -> None:
    expected = reference(prompt_of(9), 12)
    stop = expected[4]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=(stop,))
    output = llm.generate(prompt_of(9), params)[0].outputs[0]
    assert output.token_ids == expected[: expected.index(stop) + 1]
    assert output.finish_reason == "stop"
    params = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
    output = llm.generate(prompt_of(100), params)[0].outputs[0]
    assert output.token_ids == reference(prompt_of(100), 28)
    assert output.finish_reason == "length"


def test_seeded_sampling_does_not_depend_on_the_batch(llm: CompiledLLM) -> None:
    params = [
        SamplingParams(temperature=1.5, max_tokens=10, seed=seed, ignore_eos=True)
        for seed in range(7)
    ]
    prompts = [prompt_of(5 + 9 * seed, seed) for seed in range(7)]
    together = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    alone = [
        llm.generate(prompt, wanted)[0].outputs[0].token_ids
        for prompt, wanted in zip(prompts, params, strict=True)
    ]
    backwards = [
        output.outputs[0].token_ids for output in llm.generate(prompts[::-1], params[::-1])
    ]
    assert together == alone == backwards[::-1]
    other = llm.generate(
        prompts[0], SamplingParams(temperature=1.5, max_tokens=10, seed=99, ignore_eos=True)
    )
    assert other[0].outputs[0].token_ids != alone[0]
    unseeded = SamplingParams(temperature=1.5, max_tokens=10, ignore_eos=True)
    assert (
        len({tuple(llm.generate(prompts[0], unseeded)[0].outputs[0].token_ids) for _ in range(4)})
        > 1
    )


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "prompt 0: the prompt is empty: expected at least one token"),
        (
            [[5], prompt_of(128)],
            "prompt 1: the prompt has 128 tokens, and limits.max_model_len=128 leaves no room for output",
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
            "prompt 0: a prompt must be text or a list of token ids, got bytearray: decode it to text",
        ),
        (
            memoryview(b"abc"),
            "prompt 0: a prompt must be text or a list of token ids, got memoryview: decode it to text",
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
            "prompt 0: a prompt must be text or a list of token ids, got dict: pass messages as a list",
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
            "prompt 0: an array of token ids must have one dimension, got shape (2, 2): pass a list",
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
            "a message's role must be text, and its content text or a list of parts, got {'role': 1",
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


def test_another_thread_is_refused(llm: CompiledLLM) -> None:
    caught: list[Exception] = []

    def call() -> None:
        try:
            llm.generate([5, 6])
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "belongs to the thread that made it" in str(caught[0])


def test_another_thread_does_not_close_what_generates(reference: Reference) -> None:
    """While the owner generates, in a step or between two of them, it is refused; afterwards it is allowed."""
    llm = CompiledLLM(
        tiny_model("llama"), None, small_config(compile={"dispatch": "eager"}), progress=False
    )
    caught: list[str] = []

    def close() -> None:
        try:
            llm.close()
        except RuntimeError as error:
            caught.append(str(error))

    def close_elsewhere() -> None:
        thread = threading.Thread(target=close)
        thread.start()
        thread.join()

    def processor(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        close_elsewhere()
        return logits

    class Streamer(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            close_elsewhere()

        def end(self) -> None:
            """Nothing is kept."""

    options: dict[str, Any] = {"temperature": 0, "max_tokens": 3, "ignore_eos": True}
    for params, streamer, message in (
        (SamplingParams(**options, logits_processors=[processor]), None, "is in a step"),
        (SamplingParams(**options), Streamer(), "is generating in the thread that made it"),
    ):
        caught.clear()
        (output,) = llm.generate([prompt_of(9)], params, streamer=streamer)
        assert output.outputs[0].token_ids == reference(prompt_of(9), 3)
        assert len(caught) >= 3
        assert all(message in text for text in caught)
    close_elsewhere()
    with pytest.raises(RuntimeError, match="is closed"):
        llm.generate([5])


def test_strict_refuses_a_request_whose_steps_would_have_no_bucket(reference: Reference) -> None:
    """Before anything runs, so that it harms no other."""
    config = small_config(
        strict=True, buckets={"decode": [], "prefill": [48], "samplers": ["greedy"]}
    )
    with CompiledLLM(tiny_model("llama"), None, config, progress=False) as llm:
        with pytest.raises(
            ValueError,
            match=r"no prefill bucket serves the scoring sampler.*add scoring to buckets\.samplers",
        ):
            llm.generate([prompt_of(9)], SamplingParams(temperature=0, prompt_logprobs=1))
        with pytest.raises(ValueError, match="no prefill bucket serves the random sampler"):
            llm.generate([prompt_of(9)], SamplingParams(temperature=0.5))
        assert greedy(llm, [prompt_of(40)], 5) == [reference(prompt_of(40), 5)]
        assert not llm.report().fallbacks


def _to_nan(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return logits * float("nan")


def _ban_all(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.full_like(logits, float("-inf"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("processor", [_to_nan, _ban_all])
def test_scores_that_are_not_finite_end_their_request_alone(
    llm: CompiledLLM, reference: Reference, processor: Any, temperature: float
) -> None:
    plain = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    bad = SamplingParams(temperature=temperature, max_tokens=6, logits_processors=[processor])
    good, failed = (
        output.outputs[0] for output in llm.generate([prompt_of(9), prompt_of(20)], [plain, bad])
    )
    assert good.token_ids == reference(prompt_of(9), 6)
    assert (failed.token_ids, failed.finish_reason) == ([], "error")
    assert "its next token are not finite" in str(failed.error)


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}, {"logprobs": 1}],
)
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_logits_that_are_not_finite_end_their_request_alone(
    reference: Reference, params: dict[str, Any], bad: str
) -> None:
    """One row of the output head makes them; the prompt that does not fail has been computed before it was broken."""
    model = tiny_model("llama")
    with CompiledLLM(
        model, None, small_config(compile={"dispatch": "eager"}), progress=False
    ) as llm:
        right = model.lm_head.weight[5].clone()
        with torch.no_grad():
            model.lm_head.weight[5] = float(bad)
        output = llm.generate(
            [prompt_of(20)], SamplingParams(**{"max_tokens": 6, "seed": 1, **params})
        )[0].outputs[0]
        assert (output.token_ids, output.finish_reason) == ([], "error")
        with torch.no_grad():
            model.lm_head.weight[5] = right
        assert greedy(llm, [prompt_of(20)], 6) == [reference(prompt_of(20), 6)]
        (again,) = llm.generate([prompt_of(20)], SamplingParams(temperature=0, max_tokens=1))
        assert again.num_cached_tokens == 16, (
            "what the request that succeeded has computed is shared"
        )


def test_requests_join_and_leave_at_any_step(llm: CompiledLLM, reference: Reference) -> None:
    free = llm.engine.cache.num_free_blocks
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    abandoned = run_to_completion(
        llm.engine, llm._runner.make_groups([prompt_of(9)], params, None, streaming=True)
    )
    slow = llm._runner.make_groups([prompt_of(30)], params, None, streaming=True)
    running = run_to_completion(llm.engine, slow)
    next(abandoned), next(running)
    assert greedy(llm, [prompt_of(20)], 5) == [reference(prompt_of(20), 5)]
    abandoned.close()
    for _ in running:
        pass
    assert slow[0].requests[0].token_ids == reference(prompt_of(30), 50)
    assert llm.engine.cache.num_free_blocks == free
    llm.engine.cache.check()


def test_a_small_cache_makes_requests_wait_their_turn(reference: Reference) -> None:
    """Pages for one and a half sequences: requests are put off and computed again, and nothing is lost."""
    config = small_config(
        compile={"dispatch": "eager"}, cache={"memory": 13 * 16 * 2 * 2 * 2 * 16 * 4}
    )
    with CompiledLLM(tiny_model("llama"), None, config, progress=False) as engine:
        assert engine.engine.cache.num_free_blocks == [12]
        prompts = [prompt_of(length) for length in (60, 45, 10, 50, 100, 30, 14)]
        assert greedy(engine, prompts, 25) == [reference(prompt, 25) for prompt in prompts]
        assert engine.report().scheduling.preemptions
        assert engine.engine.cache.num_free_blocks == [12]
    with pytest.raises(
        ValueError,
        match=r"one sequence of 128 tokens needs .* lower limits.max_model_len or raise cache.memory",
    ):
        CompiledLLM(tiny_model("llama"), None, small_config(cache={"memory": 1000}), progress=False)


def test_a_length_beyond_the_models_positions_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"limits.max_model_len=300, but the model has only 256 positions: lower it",
    ):
        CompiledLLM(
            tiny_model("llama"), None, small_config(limits={"max_model_len": 300}), progress=False
        )


def test_an_unknown_inductor_option_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"no option 'coordinate_descent_tunning': did you mean 'coordinate_descent_tuning'\?",
    ):
        CompiledLLM(
            tiny_model("llama"),
            None,
            small_config(compile={"options": {"coordinate_descent_tunning": True}}),
            progress=False,
        )


def test_closing_restores_the_model_and_ends_the_engine() -> None:
    model = tiny_model("llama")
    expected = Reference(model)(prompt_of(9), 5)
    engine = CompiledLLM(model, None, small_config(compile={"dispatch": "eager"}), progress=False)
    assert greedy(engine, [prompt_of(9)], 5) == [expected]
    assert engine.report().fallbacks == {"compile.dispatch is eager": 5}
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="this CompiledLLM is closed"):
        engine.generate([5])
    assert model.config._attn_implementation == "sdpa"
    assert Reference(model)(prompt_of(9), 5) == expected


def eager_llm(limits: dict[str, Any]) -> CompiledLLM:
    config = small_config(limits=limits, buckets={"decode": "auto"}, compile={"dispatch": "eager"})
    return CompiledLLM(tiny_model("llama"), None, config, progress=False)


def test_a_request_that_waited_too_long_is_aborted(reference: Reference) -> None:
    limits = {
        "max_num_seqs": 1,
        "max_num_batched_tokens": 48,
        "max_model_len": 128,
        "max_waiting_seconds": 0.05,
    }
    with eager_llm(limits) as engine:
        params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
        first, second = engine.generate([prompt_of(9), prompt_of(20)], params)
        assert first.outputs[0].token_ids == reference(prompt_of(9), 100)
        assert (second.outputs[0].finish_reason, second.outputs[0].token_ids) == ("abort", [])
        assert second.outputs[0].error == "it waited longer than limits.max_waiting_seconds=0.05"
        assert greedy(engine, [prompt_of(20)], 5) == [reference(prompt_of(20), 5)]


def test_a_full_queue_refuses_and_generate_feeds_it_as_there_is_room(reference: Reference) -> None:
    limits = {
        "max_num_seqs": 2,
        "max_num_batched_tokens": 48,
        "max_model_len": 128,
        "max_waiting": 1,
    }
    with eager_llm(limits) as engine:
        requests = [
            job.requests[0]
            for job in engine._runner.make_groups([prompt_of(9)] * 4, None, None, streaming=False)
        ]
        for request in requests[:3]:
            engine.engine.add_request(request)
        with pytest.raises(QueueFullError, match=r"3 requests are waiting.*limits.max_waiting"):
            engine.engine.add_request(requests[3])
        for request in requests[:3]:
            engine.engine.abort(request)
        prompts = [prompt_of(5 + number) for number in range(7)]
        assert greedy(engine, prompts, 5) == [reference(prompt, 5) for prompt in prompts]


def test_a_failing_detokenizer_ends_its_request_alone(
    llm: CompiledLLM, reference: Reference
) -> None:
    class Failing:
        text = ""

        def push(self, token_ids: list[int]) -> bool:
            raise KeyError("no such token")

    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    bad, good = llm._runner.make_groups(
        [prompt_of(9), prompt_of(20)], params, None, streaming=False
    )
    bad.requests[0].detokenizer = Failing()  # type: ignore[assignment]
    for _ in run_to_completion(llm.engine, [bad, good]):
        pass
    assert (bad.requests[0].finish_reason, bad.requests[0].error) == (
        "error",
        "KeyError: 'no such token'",
    )
    assert good.requests[0].token_ids == reference(prompt_of(20), 8)
    llm.engine.cache.check()


def test_higher_priorities_go_first() -> None:
    limits = {"max_num_seqs": 1, "max_num_batched_tokens": 48, "max_model_len": 128}
    with eager_llm(limits) as engine:
        outputs = engine.generate(
            [prompt_of(9)] * 4, SamplingParams(temperature=0, max_tokens=3), priority=[2, 1, 0, 1]
        )
        began = [
            output.outputs[0].metrics.queue
            for output in outputs
            if output.outputs[0].metrics is not None
        ]
        assert sorted(range(4), key=lambda number: began[number] or 0.0) == [2, 1, 3, 0]


def test_prompts_may_hold_ids_that_the_model_does_not_generate() -> None:
    """As in Mllama and Moshi, whose input embedding has more rows than the output head."""
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
            match=f"logit_bias: token id {VOCAB_SIZE} is out of range: the model generates ids 0 to",
        ):
            llm.generate([5], SamplingParams(logit_bias={VOCAB_SIZE: 1.0}))
