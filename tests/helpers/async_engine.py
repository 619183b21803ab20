"""An asynchronous engine of a tiny model, and what tests do with it."""

from collections.abc import AsyncIterator
from typing import Any

from compiled_llm import AsyncCompiledLLM, CompiledLLM, RequestOutput, SamplingParams
from tests.helpers.letters import Letters
from tests.helpers.tiny_models import small_config, tiny_model

EAGER = {"dispatch": "eager"}


LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)


SHORT = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


def make_llm(**changes: Any) -> CompiledLLM:
    return CompiledLLM(
        tiny_model("llama"), None, small_config(**{"compile": EAGER, **changes}), progress=False
    )


async def free_blocks(llm: AsyncCompiledLLM) -> list[int]:
    def count(engine: CompiledLLM) -> list[int]:
        engine.engine.cache.check()
        return engine.engine.cache.num_free_blocks

    return await llm.call(count)


async def last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    return [output async for output in outputs][-1]


async def tokens(llm: AsyncCompiledLLM, prompt: list[int], params: SamplingParams) -> list[int]:
    return (await last(llm.generate(prompt, params))).outputs[0].token_ids


def spelling(tokenizer: Letters, **changes: Any) -> AsyncCompiledLLM:
    config = small_config(**{"compile": EAGER, **changes})
    return AsyncCompiledLLM(
        lambda: CompiledLLM(tiny_model("llama"), tokenizer, config, progress=False)
    )  # type: ignore[arg-type]
