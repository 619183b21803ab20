"""A failure ends the requests that it concerns, and no others."""

import asyncio
import gc
import time
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError as FutureCancelledError
from typing import Any

import pytest
import torch

from compiled_llm import AsyncCompiledLLM, CompiledLLM, RequestOutput, SamplingParams
from compiled_llm.engine.output_builder import OutputBuilder, RequestGroup
from compiled_llm.engine.processor import RequestProcessor
from compiled_llm.engine_thread import EngineThread
from compiled_llm.errors import EngineBrokenError
from tests.helpers.async_engine import (
    LONG,
    SHORT,
    free_blocks,
    last,
    make_llm,
    tokens,
)
from tests.helpers.tiny_models import Reference, prompt_of

pytestmark = pytest.mark.gpu


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
        monkeypatch.setattr(RequestProcessor, "process", slowly(0.2, RequestProcessor.process))
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
    build = OutputBuilder.build

    def failing_build(self: OutputBuilder, group: RequestGroup) -> RequestOutput:
        if group.request_id == "bad" and len(group.requests[0].token_ids) >= 5:
            raise error
        return build(self, group)

    async def main() -> None:
        monkeypatch.setattr(OutputBuilder, "build", failing_build)
        before = await free_blocks(llm)
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
        assert await free_blocks(llm) == before

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
        before = await free_blocks(llm)
        lost, good = (
            await llm.add_request(prompt_of(30), LONG),
            await llm.add_request(prompt_of(20), LONG),
        )
        lost._channel.notified, lost._channel.loop = False, Failing()  # type: ignore[assignment]
        assert (await last(good)).outputs[0].token_ids == reference(prompt_of(20), 100)
        assert lost._channel.group.requests[0].finish_reason == "abort"
        assert await free_blocks(llm) == before

    asyncio.run(main())
