"""Outputs equal those of the synchronous API, and grow until the request has ended."""

import asyncio
from typing import Any

import pytest

from compiled_llm import AsyncCompiledLLM, CompiledLLM, RequestOutput, SamplingParams
from tests.helpers.async_engine import (
    LONG,
    SHORT,
    last,
    tokens,
)
from tests.helpers.tiny_models import Reference, prompt_of, small_config, tiny_model

pytestmark = pytest.mark.gpu


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
