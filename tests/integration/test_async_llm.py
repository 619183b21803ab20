"""The asynchronous API: the tokens of the synchronous one, whoever comes, goes, waits or fails in the meantime."""

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from compiled_llm import AsyncCompiledLLM, CompiledLLM, RequestOutput, SamplingParams
from compiled_llm.async_llm import RequestStream
from compiled_llm.engine.output_builder import RequestGroup, RequestProcessor
from compiled_llm.engine.request import Request
from compiled_llm.engine_thread import EngineThread
from compiled_llm.errors import EngineBrokenError, QueueFullError
from compiled_llm.sampling_params import LogitsProcessor
from tests.helpers.tiny_models import VOCAB_SIZE, Reference, prompt_of, small_config, tiny_model

pytestmark = pytest.mark.gpu

EAGER = {"dispatch": "eager"}
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


def make_llm(**changes: Any) -> CompiledLLM:
    return CompiledLLM(
        tiny_model("llama"), None, small_config(**{"compile": EAGER, **changes}), progress=False
    )


@pytest.fixture(scope="module")
def synchronous() -> Iterator[CompiledLLM]:
    with make_llm() as engine:
        yield engine


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(tiny_model("llama"))


@pytest.fixture(scope="module")
def shared() -> Iterator[AsyncCompiledLLM]:
    engine = AsyncCompiledLLM(make_llm)
    yield engine
    engine.close()


@pytest.fixture
def llm(shared: AsyncCompiledLLM) -> Iterator[AsyncCompiledLLM]:
    """One engine for all tests, which must leave it as they found it: with all pages free and nothing to do."""
    before = asyncio.run(free_pages(shared))
    yield shared
    assert asyncio.run(free_pages(shared)) == before
    assert not asyncio.run(shared.call(lambda llm: llm.engine.num_waiting))


async def free_pages(llm: AsyncCompiledLLM) -> list[int]:
    def count(engine: CompiledLLM) -> list[int]:
        engine.engine.cache.check()
        return engine.engine.cache.num_free_blocks

    return await llm.call(count)


async def last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    return [output async for output in outputs][-1]


async def tokens(llm: AsyncCompiledLLM, prompt: list[int], params: SamplingParams) -> list[int]:
    return (await last(llm.generate(prompt, params))).outputs[0].token_ids


def mixed_params(number: int) -> SamplingParams:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": number},
        {"seed": number, "temperature": 1.5, "top_k": 20, "top_p": 0.9},
        {"seed": number, "n": 3},
        {"temperature": 0, "logprobs": 2, "stop_token_ids": list(range(3, 20))},
        {"temperature": 0, "repetition_penalty": 1.3, "min_tokens": 4},
        {"seed": number, "prompt_logprobs": 1},
    ]
    return SamplingParams(max_tokens=5 + 3 * number % 20, **kinds[number % len(kinds)])


def test_concurrent_requests_give_what_the_synchronous_api_gives(
    llm: AsyncCompiledLLM, synchronous: CompiledLLM
) -> None:
    prompts, params = (
        [prompt_of(3 + 4 * n, n) for n in range(20)],
        [mixed_params(n) for n in range(20)],
    )
    expected = synchronous.generate(prompts, params, progress=False)

    async def main() -> list[RequestOutput]:
        streams = [
            await llm.add_request(p, w, priority=n % 3, streaming=n % 2 == 0)
            for n, (p, w) in enumerate(zip(prompts, params, strict=True))
        ]
        return await asyncio.gather(*map(last, streams))

    for output, wanted in zip(asyncio.run(main()), expected, strict=True):
        assert output.finished
        got = [
            (c.index, c.token_ids, c.finish_reason, c.error, len(c.logprobs or []))
            for c in output.outputs
        ]
        assert got == [
            (c.index, c.token_ids, c.finish_reason, c.error, len(c.logprobs or []))
            for c in wanted.outputs
        ]
        assert len(output.prompt_logprobs or []) == len(wanted.prompt_logprobs or [])


def test_outputs_grow_and_a_slow_consumer_gets_the_latest(
    llm: AsyncCompiledLLM, reference: Reference
) -> None:
    expected = reference(prompt_of(9), 100)

    async def consume(seconds: float) -> list[RequestOutput]:
        stream, outputs = (
            await llm.add_request(prompt_of(9), LONG, request_id=f"after {seconds}"),
            [],
        )
        async for output in stream:
            outputs.append(output)
            await asyncio.sleep(seconds)
        assert stream.request_id == f"after {seconds}"
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        return outputs

    async def main() -> tuple[list[RequestOutput], list[RequestOutput]]:
        return await asyncio.gather(consume(0), consume(0.1))

    fast, slow = asyncio.run(main())
    for outputs in (fast, slow):
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        assert lengths == sorted(set(lengths))
        assert all(
            output.outputs[0].token_ids == expected[:length]
            for output, length in zip(outputs, lengths, strict=True)
        )
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert len(slow) < len(fast)
    assert (fast[-1].request_id, slow[-1].request_id) == ("after 0", "after 0.1")


def test_a_request_that_does_not_stream_gives_one_output(llm: AsyncCompiledLLM) -> None:
    async def main() -> list[RequestOutput]:
        params = SamplingParams(n=3, seed=1, max_tokens=20)
        return [
            output async for output in await llm.add_request(prompt_of(9), params, streaming=False)
        ]

    (output,) = asyncio.run(main())
    assert output.finished
    assert len(output.outputs) == 3


Leave = Callable[[AsyncCompiledLLM], Coroutine[Any, Any, None]]


async def leave_by_break(llm: AsyncCompiledLLM) -> None:
    async for _ in llm.generate(prompt_of(60), LONG):
        break


async def leave_by_closing_the_generator(llm: AsyncCompiledLLM) -> None:
    outputs = llm.generate(prompt_of(60), LONG)
    await anext(outputs)
    await outputs.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(outputs)


async def leave_by_closing_the_stream(llm: AsyncCompiledLLM) -> None:
    async with await llm.add_request(prompt_of(60), LONG) as stream:
        await anext(stream)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def leave_by_dropping_the_stream(llm: AsyncCompiledLLM) -> None:
    await anext(await llm.add_request(prompt_of(60), LONG, request_id="dropped"))


async def leave_by_timeout(llm: AsyncCompiledLLM) -> None:
    stream = await llm.add_request(prompt_of(60), LONG, streaming=False)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(stream), 0.005)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def leave_by_cancelling(llm: AsyncCompiledLLM) -> None:
    began = asyncio.Event()

    async def consume() -> None:
        async for _ in llm.generate(
            prompt_of(60), SamplingParams(n=3, max_tokens=60, ignore_eos=True)
        ):
            began.set()

    task = asyncio.create_task(consume())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_while_adding(llm: AsyncCompiledLLM) -> None:
    for number in range(20):
        task = asyncio.create_task(llm.add_request(prompt_of(60), LONG))
        await asyncio.sleep(number * 0.0002)
        task.cancel()
        with suppress(asyncio.CancelledError):
            (await task).close()


async def leave_by_abort(llm: AsyncCompiledLLM) -> None:
    stream = await llm.add_request(prompt_of(60), LONG, request_id="mine")
    first = await anext(stream)
    await llm.abort("mine")
    await llm.abort("mine")
    await llm.abort("nobody's")
    output = await last(stream)
    assert output.outputs[0].finish_reason == "abort"
    assert output.outputs[0].token_ids[:1] == first.outputs[0].token_ids[:1]


@pytest.mark.parametrize(
    "leave",
    [
        leave_by_break,
        leave_by_closing_the_generator,
        leave_by_closing_the_stream,
        leave_by_dropping_the_stream,
        leave_by_timeout,
        leave_by_cancelling,
        leave_while_adding,
        leave_by_abort,
    ],
)
def test_whoever_leaves_frees_the_pages(
    llm: AsyncCompiledLLM, reference: Reference, leave: Leave
) -> None:
    async def main() -> None:
        before = await free_pages(llm)
        other = await llm.add_request(
            prompt_of(20),
            SamplingParams(temperature=0, max_tokens=105, ignore_eos=True),
            request_id="other",
        )
        await anext(other)
        await leave(llm)
        for _ in range(
            5
        ):  # an abandoned generator's finalizer is a task, which the loop has to make and to run
            await asyncio.sleep(0)
        running = await llm.call(
            lambda engine: len(engine.engine._core.batch.running) + engine.engine.num_waiting
        )
        assert running == 1
        await llm.abort("other")
        assert await free_pages(llm) == before
        assert await tokens(llm, prompt_of(60), SHORT) == reference(prompt_of(60), 5)

    asyncio.run(main())


def test_a_storm_of_cancellations(llm: AsyncCompiledLLM, reference: Reference) -> None:
    generator = random.Random(0)

    async def one(number: int) -> tuple[int, list[int]] | None:
        await asyncio.sleep(generator.random() * 0.5)
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        return number, await tokens(llm, prompt_of(10 + number % 40, number), params)

    async def main() -> list[Any]:
        before = await free_pages(llm)
        tasks = [asyncio.create_task(one(number)) for number in range(100)]
        for task in generator.sample(tasks, 80):
            await asyncio.sleep(generator.random() * 0.02)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert await free_pages(llm) == before
        assert await tokens(llm, prompt_of(60), SHORT) == reference(prompt_of(60), 5)
        return results

    results = asyncio.run(main())
    finished = [result for result in results if isinstance(result, tuple)]
    assert all(isinstance(result, tuple | asyncio.CancelledError) for result in results)
    assert 20 <= len(finished) < 100
    for number, got in finished[:10]:
        assert got == reference(prompt_of(10 + number % 40, number), 20)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty: expected at least one token"),
        (
            prompt_of(128),
            {},
            "the prompt has 128 tokens, which limits.max_model_len=128 leaves no answer to",
        ),
        ([VOCAB_SIZE], {}, f"token id {VOCAB_SIZE} is out of range"),
        ("text", {}, "this model has no tokenizer"),
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
        ([5], {"params": {"max_tokens": 5}}, "params must be SamplingParams, got dict"),
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
        ValueError, match=r"stream\(\) yields text, and this model has no tokenizer"
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


def test_a_failing_logits_processor_ends_its_request_alone(
    llm: AsyncCompiledLLM, reference: Reference
) -> None:
    def fail(ids: torch.LongTensor, logits: torch.FloatTensor) -> torch.FloatTensor:
        if ids.shape[1] == 12:
            raise KeyError("no such thing")
        return logits

    async def main() -> tuple[RequestOutput, RequestOutput]:
        failing = SamplingParams(
            temperature=0, max_tokens=20, ignore_eos=True, logits_processors=[fail]
        )
        first, second = await asyncio.gather(
            last(llm.generate(prompt_of(9), failing)), last(llm.generate(prompt_of(20), LONG))
        )
        return first, second

    failed, other = asyncio.run(main())
    assert (failed.outputs[0].finish_reason, failed.outputs[0].error) == (
        "error",
        "KeyError: 'no such thing'",
    )
    assert failed.outputs[0].token_ids == reference(prompt_of(9), 3)
    assert other.outputs[0].token_ids == reference(prompt_of(20), 100)


def test_a_broken_engine_ends_everything_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> None:
        raise EngineBrokenError("the device is gone")

    def slowly(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            result = function(*args, **named)
            time.sleep(seconds)
            return result

        return call

    async def main() -> None:
        # What comes while the thread is ending shall be told the cause too.
        monkeypatch.setattr(EngineThread, "_deliver", slowly(0.1, EngineThread._deliver))
        monkeypatch.setattr(RequestProcessor, "make", slowly(0.2, RequestProcessor.make))
        llm = await asyncio.to_thread(AsyncCompiledLLM, make_llm)
        streams = [await llm.add_request(prompt_of(9, n), LONG, streaming=n > 0) for n in range(6)]
        model_runner = await llm.call(lambda engine: weakref.ref(engine.model_runner))
        await llm.call(lambda engine: setattr(engine.engine, "step", step))
        for error in await asyncio.gather(*map(last, streams), return_exceptions=True):
            assert isinstance(error, EngineBrokenError)
        with pytest.raises(StopAsyncIteration):
            await anext(streams[0])
        for late in (
            llm.add_request([5]),
            anext(llm.generate([5])),
            anext(llm.stream([5])),
            llm.abort("mine"),
            llm.report(),
        ):
            with pytest.raises(
                RuntimeError,
                match="this AsyncCompiledLLM has failed, EngineBrokenError: the device is gone",
            ) as caught:
                await late
            assert isinstance(caught.value.__cause__, EngineBrokenError)
        llm.close()
        llm.close()
        gc.collect()
        assert model_runner() is None  # its caches and graphs are free for the next engine

    asyncio.run(main())


class Letters:
    """A tokenizer of 26 tokens, which raises what sentencepiece does for others."""

    chat_template, eos_token_id, num_texts = None, None, 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        self.num_texts += 1
        return {"input_ids": [ord(character) % 26 for character in text]}

    def decode(self, ids: list[int], **_: object) -> str:
        if any(token >= 26 for token in ids):
            raise IndexError("piece id is out of range.")
        return "".join(chr(97 + token) for token in ids)


class NoLetters(Letters):
    """Fails at some of the tokens that it knows."""

    def decode(self, ids: list[int], **_: object) -> str:
        if 7 in ids:
            raise ValueError("no text for 7")
        return super().decode(ids)


def spelling(tokenizer: Letters, **changes: Any) -> AsyncCompiledLLM:
    config = small_config(**{"compile": EAGER, **changes})
    return AsyncCompiledLLM(
        lambda: CompiledLLM(tiny_model("llama"), tokenizer, config, progress=False)
    )  # type: ignore[arg-type]


def test_tokens_that_the_tokenizer_does_not_know_have_no_text(reference: Reference) -> None:
    async def main() -> None:
        async with spelling(Letters()) as llm:
            outputs = await asyncio.gather(
                last(llm.generate(prompt_of(20), LONG)),
                last(
                    llm.generate(
                        prompt_of(9),
                        SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=3),
                    )
                ),
                last(
                    llm.generate(
                        prompt_of(30),
                        SamplingParams(
                            temperature=0, max_tokens=9, prompt_logprobs=3, ignore_eos=True
                        ),
                    )
                ),
            )
            for output, (length, count) in zip(outputs, [(20, 100), (9, 9), (30, 9)], strict=True):
                expected = reference(prompt_of(length), count)
                assert (output.outputs[0].token_ids, output.outputs[0].error) == (expected, None)
                assert output.text == "".join(chr(97 + token) for token in expected if token < 26)
            for entry in [
                *(outputs[1].outputs[0].logprobs or []),
                *(outputs[2].prompt_logprobs or [])[1:],
            ]:
                assert entry is not None
                assert all(
                    one.decoded_token == (chr(97 + token) if token < 26 else "")
                    for token, one in entry.items()
                )

    asyncio.run(main())


def test_a_tokenizer_that_fails_ends_its_request_alone(reference: Reference) -> None:
    prompt = [*prompt_of(20), 7, 5, 6, 8, 4, 3, 9, 10, 11]  # none of the last tokens fails

    async def main() -> None:
        async with spelling(NoLetters()) as llm:
            before = await free_pages(llm)
            other = await llm.add_request(prompt_of(9), LONG, streaming=False)
            failing = SamplingParams(temperature=0, max_tokens=9, prompt_logprobs=0)
            output = await last(await llm.add_request(prompt, failing))
            assert (output.outputs[0].finish_reason, output.outputs[0].error) == (
                "error",
                "ValueError: no text for 7",
            )
            assert (await last(other)).outputs[0].token_ids == reference(prompt_of(9), 100)
            assert await free_pages(llm) == before

    asyncio.run(main())


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(3),
        KeyboardInterrupt(),
        StopIteration(1),
        asyncio.CancelledError(),
        FutureCancelledError(),
        GeneratorExit(),
    ],
)
def test_whatever_a_call_raises_its_caller_is_told_and_the_thread_goes_on(
    llm: AsyncCompiledLLM, reference: Reference, error: BaseException
) -> None:
    def fail(_: CompiledLLM) -> None:
        raise error

    async def main() -> None:
        with pytest.raises(
            RuntimeError, match=f"{type(error).__name__} was raised in the engine's thread"
        ) as caught:
            await llm.call(fail)
        assert caught.value.__cause__ is error
        assert await tokens(llm, prompt_of(9), SHORT) == reference(prompt_of(9), 5)

    asyncio.run(main())


@pytest.mark.parametrize("error", [KeyError("lost"), SystemExit(3), MemoryError()])
@pytest.mark.parametrize("streaming", [True, False])
def test_an_output_that_cannot_be_made_ends_its_request_alone(
    llm: AsyncCompiledLLM,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    streaming: bool,
) -> None:
    make = RequestProcessor.output

    def output(self: RequestProcessor, job: RequestGroup) -> RequestOutput:
        if job.request_id == "bad" and len(job.requests[0].token_ids) >= 5:
            raise error
        return make(self, job)

    async def main() -> None:
        monkeypatch.setattr(RequestProcessor, "output", output)
        before = await free_pages(llm)
        bad = await llm.add_request(
            prompt_of(30),
            SamplingParams(n=2, max_tokens=9, ignore_eos=True),
            request_id="bad",
            streaming=streaming,
        )
        good = await llm.add_request(prompt_of(20), LONG)
        with pytest.raises(type(error) if isinstance(error, Exception) else RuntimeError):
            await last(bad)
        again = await llm.add_request(prompt_of(9), SHORT, request_id="bad2")
        assert (await last(good)).outputs[0].token_ids == reference(prompt_of(20), 100)
        assert (await last(again)).outputs[0].token_ids == reference(prompt_of(9), 5)
        assert await free_pages(llm) == before

    asyncio.run(main())


def test_an_event_loop_that_fails_hurts_no_other(
    llm: AsyncCompiledLLM, reference: Reference
) -> None:
    class Failing:
        def is_closed(self) -> bool:
            return False

        def call_soon_threadsafe(self, *_: Any) -> None:
            raise OSError("its pipe is broken")

    async def main() -> None:
        before = await free_pages(llm)
        lost, good = (
            await llm.add_request(prompt_of(30), LONG),
            await llm.add_request(prompt_of(20), LONG),
        )
        lost._channel.notified, lost._channel.loop = False, Failing()  # type: ignore[assignment]
        assert (await last(good)).outputs[0].token_ids == reference(prompt_of(20), 100)
        assert lost._channel.job.requests[0].finish_reason == "abort"
        assert await free_pages(llm) == before

    asyncio.run(main())


def test_a_stream_is_refused_in_another_event_loop(llm: AsyncCompiledLLM) -> None:
    stream = asyncio.run(llm.add_request(prompt_of(60), LONG, streaming=False))
    with pytest.raises(RuntimeError, match="this stream belongs to another event loop"):
        asyncio.run(last(stream))


def test_a_fork_is_refused_instead_of_waiting_for_a_thread_that_it_has_not(
    llm: AsyncCompiledLLM,
) -> None:
    async def use(method: Callable[[], Any]) -> bool:
        try:
            await asyncio.wait_for(method(), 5)
        except RuntimeError as error:
            return "its thread is not in this fork of it" in str(error)
        return False

    methods = [
        lambda: llm.add_request([5]),
        llm.report,
        lambda: llm.abort("mine"),
        lambda: anext(llm.generate([5])),
        llm.reset_prefix_cache,
    ]
    child = os.fork()
    if not child:
        code = 1
        try:
            code = 0 if all(asyncio.run(use(method)) for method in methods) else 2
            llm.close()  # the parent's thread is not this process's to end
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    asyncio.run(llm.report())


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
                match=r"n must be at most 5 here, got 16384: limits.max_num_seqs=2 may run",
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
            assert (len(made), tokenizer.num_texts) == (5, 3)
            with pytest.raises(QueueFullError, match="3 requests are waiting, as many as"):
                await llm.add_request("hello", SHORT)
            assert (len(made), tokenizer.num_texts) == (5, 3)
            await asyncio.gather(*map(last, [*running, *waiting]))

    asyncio.run(main())


def test_what_the_start_raises_the_constructor_raises() -> None:
    with pytest.raises(
        ValueError, match=r"limits.max_model_len=300, but the model has only 256 positions"
    ):
        AsyncCompiledLLM(lambda: make_llm(limits={"max_model_len": 300}))


def test_closing_ends_what_runs(reference: Reference) -> None:
    async def main() -> None:
        llm = AsyncCompiledLLM(make_llm)
        streams = [await llm.add_request(prompt_of(9, n), LONG, streaming=n > 0) for n in range(6)]
        await anext(streams[1])
        waiting = asyncio.create_task(last(streams[2]))
        await asyncio.sleep(0)
        llm.close()
        llm.close()
        outputs = [
            await last(streams[0]),
            await last(streams[1]),
            await waiting,
            *[await last(s) for s in streams[3:]],
        ]
        for number, output in enumerate(outputs):
            assert output.outputs[0].finish_reason == "abort"
            got = output.outputs[0].token_ids
            assert got == reference(prompt_of(9, number), 100)[: len(got)]
        with pytest.raises(RuntimeError, match="this AsyncCompiledLLM is closed: make a new one"):
            await llm.add_request([5])
        with pytest.raises(RuntimeError, match="this AsyncCompiledLLM is closed: make a new one"):
            await llm.reset_prefix_cache()

    engines = _num_engine_threads()  # torch and Inductor start threads of their own
    asyncio.run(main())
    assert _num_engine_threads() == engines


def _num_engine_threads() -> int:
    return sum(thread.name == "compiled-llm-engine" for thread in threading.enumerate())


def test_several_threads_and_event_loops_at_once(
    llm: AsyncCompiledLLM, reference: Reference
) -> None:
    async def several(first: int) -> list[list[int]]:
        return await asyncio.gather(
            *(tokens(llm, prompt_of(9 + n, n), SHORT) for n in range(first, first + 5))
        )

    def abandon(_: int) -> None:
        """A loop that is closed while its request runs."""

        async def main() -> None:
            kept.append(await llm.add_request(prompt_of(60), LONG))

        asyncio.run(main())

    kept: list[RequestStream] = []
    with ThreadPoolExecutor(8) as pool:
        abandoned = pool.map(abandon, range(3))
        results = list(pool.map(lambda first: asyncio.run(several(first)), range(0, 25, 5)))
        list(abandoned)
    for number, got in enumerate(result for group in results for result in group):
        assert got == reference(prompt_of(9 + number, number), 5)
    requests = [request for stream in kept for request in stream._channel.job.requests]
    while any(request.finish_reason is None for request in requests):
        time.sleep(0.01)
    assert [request.finish_reason for request in requests] == ["abort"] * 3


def test_the_report_and_the_prefix_cache(llm: AsyncCompiledLLM) -> None:
    async def main() -> None:
        prompt = prompt_of(100)
        await llm.reset_prefix_cache()
        before = await llm.report()
        found = [(await last(llm.generate(prompt, SHORT))).num_cached_tokens for _ in range(2)]
        await llm.reset_prefix_cache()
        found.append((await last(llm.generate(prompt, SHORT))).num_cached_tokens)
        assert found == [0, 96, 0]
        assert (await llm.report()).scheduling.steps > before.scheduling.steps

    asyncio.run(main())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """A token for each byte, from 3 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(
            vocab={character: 3 + number for number, character in enumerate(alphabet)}, merges=[]
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def speaking(tokenizer: PreTrainedTokenizerBase) -> Iterator[AsyncCompiledLLM]:
    model, config = tiny_model("llama", vocab_size=300), small_config(compile=EAGER)
    engine = AsyncCompiledLLM(lambda: CompiledLLM(model, tokenizer, config, progress=False))
    yield engine
    engine.close()


def saying(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, **params: Any
) -> SamplingParams:
    """Params that make the model give this answer."""
    begin, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(answer)["input_ids"]

    def force(known: torch.LongTensor, logits: torch.FloatTensor) -> torch.FloatTensor:
        forced = torch.full_like(logits, float("-inf"))
        forced[:, ids[known.shape[1] - begin]] = 0
        return forced  # type: ignore[return-value]

    processors: list[LogitsProcessor] = [force]
    return SamplingParams(
        temperature=0, max_tokens=len(ids), logits_processors=processors, **params
    )


def test_text_comes_in_whole_characters_and_stays(
    speaking: AsyncCompiledLLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    answer, kept = "Grüße 🙂 an ST und STO, STOP: nicht mehr", "Grüße 🙂 an ST und STO, "
    params = saying(tokenizer, "Hallo", answer, stop="STOP")

    async def main() -> tuple[list[str], list[str], str, str]:
        pieces = [piece async for piece in speaking.stream("Hallo", params)]
        texts = [output.text async for output in speaking.generate("Hallo", params)]
        alone = await last(await speaking.add_request("Hallo", params, streaming=False))
        whole = await last(speaking.generate("Hallo", saying(tokenizer, "Hallo", answer)))
        return pieces, texts, alone.text, whole.text

    pieces, texts, alone, whole = asyncio.run(main())
    assert "".join(pieces) == texts[-1] == alone == kept
    assert whole == answer
    assert len(pieces) > 5
    assert all(kept.startswith(text) for text in texts)
    assert "\ufffd" not in "".join(texts)
    with pytest.raises(
        ValueError, match=r"stream\(\) yields one completion, got n=2: use generate\(\)"
    ):
        asyncio.run(anext(speaking.stream("Hallo", SamplingParams(n=2))))


def test_many_streams_of_text_at_once(
    speaking: AsyncCompiledLLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    answers = [f"{number}: " + "äöü🙂ß" * (number % 4 + 1) for number in range(12)]

    async def read(number: int, answer: str) -> str:
        prompt = f"Frage {number}"
        return "".join(
            [piece async for piece in speaking.stream(prompt, saying(tokenizer, prompt, answer))]
        )

    async def main() -> list[str]:
        return await asyncio.gather(
            *(read(number, answer) for number, answer in enumerate(answers))
        )

    assert asyncio.run(main()) == answers


def test_compiled_steps_in_the_engines_own_thread(reference: Reference) -> None:
    def make() -> CompiledLLM:
        config = small_config(buckets={"decode": [4], "prefill": [48]})
        return CompiledLLM(tiny_model("llama"), None, config, progress=False)

    async def main() -> None:
        async with AsyncCompiledLLM(make) as llm:
            prompts = [prompt_of(5 + 9 * n, n) for n in range(10)]
            params = SamplingParams(temperature=0, max_tokens=15, ignore_eos=True)
            got = await asyncio.gather(*(tokens(llm, prompt, params) for prompt in prompts))
            assert got == [reference(prompt, 15) for prompt in prompts]
            report = await llm.report()
            assert not report.fallbacks
            assert not any(report.graph_events.values())
            assert sum(bucket.replays for bucket in report.buckets) == report.scheduling.steps

    asyncio.run(main())


def test_what_is_not_closed_does_not_keep_the_interpreter() -> None:
    code = """
        import asyncio
        from compiled_llm import AsyncCompiledLLM
        from tests.integration.test_async_llm import LONG, make_llm, prompt_of

        async def main():
            await anext(await llm.add_request(prompt_of(9), LONG))
            kept.append(await llm.add_request(prompt_of(9), LONG))

        kept, llm = [], AsyncCompiledLLM(make_llm)
        asyncio.run(main())
        print("done")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr[-2000:]) == (0, "done\n", "")


def test_a_forked_process_is_refused_and_does_not_hang(
    llm: AsyncCompiledLLM, synchronous: CompiledLLM
) -> None:
    async def ask() -> None:
        with pytest.raises(RuntimeError, match="fork of it"):
            await llm.add_request([5, 6])
        with pytest.raises(RuntimeError, match="fork of it"):
            await llm.report()

    child = os.fork()
    if not child:
        code = 1
        try:
            asyncio.run(asyncio.wait_for(ask(), 10))
            with pytest.raises(RuntimeError, match="fork of it"):
                synchronous.generate([5, 6])
            llm.close()  # nothing to end
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + 30
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(status[1]) == 0
