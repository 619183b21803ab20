"""Start, end, forks, threads and event loops."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from compiled_llm import AsyncCompiledLLM, CompiledLLM
from compiled_llm.async_llm import RequestStream
from tests.helpers.async_engine import (
    LONG,
    SHORT,
    last,
    make_llm,
    tokens,
)
from tests.helpers.tiny_models import Reference, prompt_of

pytestmark = pytest.mark.gpu


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


def test_a_stream_is_refused_in_another_event_loop(llm: AsyncCompiledLLM) -> None:
    stream = asyncio.run(llm.add_request(prompt_of(60), LONG, streaming=False))
    with pytest.raises(RuntimeError, match="this stream belongs to another event loop"):
        asyncio.run(last(stream))


def test_several_threads_and_event_loops_at_once(
    llm: AsyncCompiledLLM, reference: Reference
) -> None:
    async def several(first: int) -> list[list[int]]:
        return await asyncio.gather(
            *(tokens(llm, prompt_of(9 + n, n), SHORT) for n in range(first, first + 5))
        )

    def abandon(_: int) -> None:
        """Close the event loop while its request runs."""

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
    requests = [request for stream in kept for request in stream._channel.group.requests]
    while any(request.finish_reason is None for request in requests):
        time.sleep(0.01)
    assert [request.finish_reason for request in requests] == ["abort"] * 3


def test_a_fork_is_refused_instead_of_waiting_for_a_thread_that_it_has_not(
    llm: AsyncCompiledLLM,
) -> None:
    async def use(method: Callable[[], Any]) -> bool:
        try:
            await asyncio.wait_for(method(), 5)
        except RuntimeError as error:
            return "does not run in this fork of it" in str(error)
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


def test_what_is_not_closed_does_not_keep_the_interpreter() -> None:
    code = """
        import asyncio
        from compiled_llm import AsyncCompiledLLM
        from tests.helpers.async_engine import LONG, make_llm
        from tests.helpers.tiny_models import prompt_of

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
