"""Invalid requests and requests beyond the queue limit are refused before they run."""

import asyncio
from typing import Any

import pytest

from compiled_llm import AsyncCompiledLLM, SamplingParams
from compiled_llm.engine.request import Request
from compiled_llm.errors import QueueFullError
from tests.helpers.async_engine import (
    LONG,
    SHORT,
    last,
    make_llm,
    spelling,
    tokens,
)
from tests.helpers.letters import Letters
from tests.helpers.tiny_models import VOCAB_SIZE, Reference, prompt_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty: expected at least one token"),
        (
            prompt_of(128),
            {},
            "the prompt has 128 tokens, and limits.max_model_len=128 leaves no room for output",
        ),
        ([VOCAB_SIZE], {}, f"token id {VOCAB_SIZE} is out of range"),
        ("text", {}, "a text prompt needs a tokenizer, and this model has no tokenizer"),
        (b"abc", {}, "a prompt must be text or a list of token ids, got bytes: decode it to text"),
        ([True], {}, "token ids must be whole numbers, got True"),
        ([[5], [6]], {}, "token ids must be whole numbers, got [5]"),
        (["a", "b"], {}, "token ids must be whole numbers, got 'a'"),
        (
            {"role": "user", "content": "a"},
            {},
            "a prompt must be text or a list of token ids, got dict: pass messages as a list",
        ),
        ([5], {"request_id": 7}, "request_id must be text or None, got 7"),
        (
            [5],
            {"sampling_params": {"max_tokens": 5}},
            "sampling_params must be SamplingParams, got dict",
        ),
        ([5], {"priority": "high"}, "priority must be a whole number, got 'high'"),
        ([5], {"request_id": "taken"}, "request_id 'taken' is that of a running request"),
    ],
)
def test_bad_input_is_refused_alone(
    llm: AsyncCompiledLLM, reference: Reference, prompt: Any, options: Any, message: str
) -> None:
    async def main() -> None:
        other = await llm.add_request(prompt_of(20), LONG, request_id="taken")
        with pytest.raises(ValueError) as caught:  # noqa: PT011  # the text is compared below
            await llm.add_request(prompt, **options)
        assert str(caught.value).startswith(message)
        with pytest.raises(ValueError):  # noqa: PT011
            await anext(llm.generate(prompt, **options))
        assert (await last(other)).outputs[0].token_ids == reference(prompt_of(20), 100)
        assert await tokens(llm, prompt_of(9), SHORT) == reference(prompt_of(9), 5)
        again = await llm.add_request([5], SHORT, request_id="taken")
        assert (await last(again)).request_id == "taken"

    asyncio.run(main())


def test_streams_of_text_are_refused_where_there_is_none(llm: AsyncCompiledLLM) -> None:
    with pytest.raises(
        ValueError,
        match=r"stream\(\) yields text, which needs a tokenizer, and this model has no tokenizer",
    ):
        asyncio.run(anext(llm.stream([5])))


def test_a_full_queue_refuses_before_anything_runs(reference: Reference) -> None:
    limits = {
        "max_num_seqs": 2,
        "max_num_batched_tokens": 48,
        "max_model_len": 128,
        "max_waiting": 2,
    }

    async def main() -> None:
        async with AsyncCompiledLLM(lambda: make_llm(limits=limits)) as llm:
            running = []
            for number in range(2):
                running.append(await llm.add_request(prompt_of(9, number), LONG))
                await anext(running[-1])
            waiting = [await llm.add_request(prompt_of(9, 2), SHORT)]
            with pytest.raises(
                QueueFullError, match=r"1 requests are waiting, 2 more exceed limits\.max_waiting=2"
            ):
                await llm.add_request(
                    prompt_of(9), SamplingParams(n=2, max_tokens=5)
                )  # all of it or nothing
            waiting.append(await llm.add_request(prompt_of(9, 3), SHORT))
            with pytest.raises(QueueFullError, match="2 requests are waiting"):
                await anext(llm.generate(prompt_of(9), SHORT))
            for number, output in enumerate(await asyncio.gather(*map(last, [*running, *waiting]))):
                assert output.outputs[0].token_ids == reference(
                    prompt_of(9, number), 100 if number < 2 else 5
                )

    asyncio.run(main())


def test_nothing_is_made_of_what_the_queue_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {
        "max_num_seqs": 2,
        "max_num_batched_tokens": 48,
        "max_model_len": 128,
        "max_waiting": 3,
    }
    tokenizer, made = Letters(), list[int]()

    class Counted(Request):
        def __init__(self, **options: Any) -> None:
            made.append(1)
            super().__init__(**options)

    async def main() -> None:
        async with spelling(tokenizer, limits=limits) as llm:
            monkeypatch.setattr("compiled_llm.engine.processor.Request", Counted)
            with pytest.raises(
                ValueError,
                match=r"n must be at most 5 here, got 16384: at most limits.max_num_seqs=2 run",
            ):
                await llm.add_request("hello", SamplingParams(n=16_384))
            running = [await llm.add_request(prompt_of(9), LONG) for _ in range(2)]
            for stream in running:
                await anext(stream)
            with pytest.raises(
                QueueFullError, match=r"0 requests are waiting, 4 more exceed limits\.max_waiting=3"
            ):
                await llm.add_request("hello", SamplingParams(n=4))
            waiting = [await llm.add_request("hello", SHORT) for _ in range(3)]
            assert (len(made), len(tokenizer.lengths)) == (5, 3)
            with pytest.raises(QueueFullError, match="3 requests are waiting, as many as"):
                await llm.add_request("hello", SHORT)
            assert (len(made), len(tokenizer.lengths)) == (5, 3)
            await asyncio.gather(*map(last, [*running, *waiting]))

    asyncio.run(main())
