"""A consumer that leaves a stream in any way frees its blocks."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from compiled_llm import AsyncCompiledLLM, SamplingParams
from tests.helpers.async_engine import (
    LONG,
    SHORT,
    free_blocks,
    last,
    tokens,
)
from tests.helpers.tiny_models import Reference, prompt_of

pytestmark = pytest.mark.gpu


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
        before = await free_blocks(llm)
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
        assert await free_blocks(llm) == before
        assert await tokens(llm, prompt_of(60), SHORT) == reference(prompt_of(60), 5)

    asyncio.run(main())


def test_a_storm_of_cancellations(llm: AsyncCompiledLLM, reference: Reference) -> None:
    generator = random.Random(0)

    async def one(number: int) -> tuple[int, list[int]] | None:
        await asyncio.sleep(generator.random() * 0.5)
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        return number, await tokens(llm, prompt_of(10 + number % 40, number), params)

    async def main() -> list[Any]:
        before = await free_blocks(llm)
        tasks = [asyncio.create_task(one(number)) for number in range(100)]
        for task in generator.sample(tasks, 80):
            await asyncio.sleep(generator.random() * 0.02)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert await free_blocks(llm) == before
        assert await tokens(llm, prompt_of(60), SHORT) == reference(prompt_of(60), 5)
        return results

    results = asyncio.run(main())
    finished = [result for result in results if isinstance(result, tuple)]
    assert all(isinstance(result, tuple | asyncio.CancelledError) for result in results)
    assert 20 <= len(finished) < 100
    for number, got in finished[:10]:
        assert got == reference(prompt_of(10 + number % 40, number), 20)
