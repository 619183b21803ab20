"""Serve several requests from asyncio tasks with the default model, SmolLM2-135M-Instruct.

    python examples/asynchronous.py [--config CONFIG.yaml]

A long request starts alone. Two short ones join the running batch after its first token and
finish before it; a third is abandoned after a few tokens. Prints a line when a request receives
its first token and when it finishes, then the answers.
"""

import argparse
import asyncio
from contextlib import aclosing
from pathlib import Path

from compiled_llm import AsyncCompiledLLM, SamplingParams

LONG = "Write a short story about a lighthouse."
SHORT = ["What is the capital of France?", "How many days are in a week?"]


async def complete(
    llm: AsyncCompiledLLM,
    question: str,
    max_tokens: int,
    started: asyncio.Event | None = None,
) -> str:
    """Answer one question; set `started` after its first token."""
    started = started or asyncio.Event()
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    text = ""
    # Each output holds everything generated so far.
    async for output in llm.generate([{"role": "user", "content": question}], params):
        text = output.text
        if not started.is_set():
            started.set()
            print(f"started:  {question}", flush=True)
    print(f"finished: {question}", flush=True)
    return text


async def abandon(llm: AsyncCompiledLLM, prompt: str) -> None:
    """Stop reading a stream after five pieces; closing it aborts the request."""
    async with aclosing(llm.stream(prompt, SamplingParams(max_tokens=200))) as pieces:
        for _ in range(5):
            await anext(pieces)
    print(f"aborted:  {prompt}", flush=True)


async def main() -> None:
    """Run the requests in one engine."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("smollm2.yaml"))
    config = parser.parse_args().config

    async with await AsyncCompiledLLM.start(config=config) as llm:
        started = asyncio.Event()
        long = asyncio.create_task(complete(llm, LONG, 96, started))
        await started.wait()
        short = [complete(llm, question, 10) for question in SHORT]
        *answers, _ = await asyncio.gather(*short, abandon(llm, "Once upon a time"))
        for text in [*answers, await long]:
            print(f"\n{text}")


if __name__ == "__main__":
    asyncio.run(main())
