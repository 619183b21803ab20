"""Two engines in one process, each in a thread of its own.

One starts, compiles or captures while the other runs requests.
"""

import asyncio
import sys
import threading
from collections.abc import Coroutine, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from compiled_llm import AsyncCompiledLLM, CompiledLLM, Config, SamplingParams
from compiled_llm.runtime.capture import warmup
from compiled_llm.runtime.compilation.compiler import CompiledStep
from compiled_llm.runtime.compilation.timing import Timestamp, durations
from compiled_llm.runtime.step.step import Step
from compiled_llm.system.compiler_lock import COMPILER_LOCK
from tests.helpers.tiny_models import Reference, greedy, prompt_of, small_config, tiny_model

pytestmark = pytest.mark.gpu

T = TypeVar("T")
EAGER = small_config(compile={"dispatch": "eager"})
FAMILIES = ("llama", "olmo2")


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    """Switch between threads at many places, not only where one waits."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


def _make(model: PreTrainedModel, config: Config) -> AsyncCompiledLLM:
    return AsyncCompiledLLM(lambda: CompiledLLM(model, None, config, progress=False))


async def _start(model: PreTrainedModel, config: Config) -> AsyncCompiledLLM:
    return await asyncio.to_thread(_make, model, config)


async def _complete(llm: AsyncCompiledLLM, prompt: Sequence[int], num_tokens: int) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    async with await llm.add_request(list(prompt), params, streaming=False) as outputs:
        (output,) = [output async for output in outputs]
    return output.outputs[0].token_ids


async def _complete_all(
    llm: AsyncCompiledLLM, prompts: Sequence[Sequence[int]], num_tokens: int
) -> list[list[int]]:
    return await asyncio.gather(*(_complete(llm, prompt, num_tokens) for prompt in prompts))


async def _until(
    done: asyncio.Future[Any], llm: AsyncCompiledLLM, prompt: Sequence[int], num_tokens: int
) -> list[list[int]]:
    """Complete the prompt repeatedly, at least once, until `done`."""
    found = [await _complete(llm, prompt, num_tokens)]
    while not done.done():
        found.append(await _complete(llm, prompt, num_tokens))
    return found


def _run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(main, 300))


def _uncompiled(step: Step, *arguments: object, **options: object) -> CompiledStep:
    now = Timestamp.now()
    return CompiledStep(
        launch=step, graph=False, recording=None, function=None, seconds=durations(now, now, now)
    )


def test_both_run_requests() -> None:
    models = [tiny_model(family) for family in FAMILIES]
    prompts = [prompt_of(20 + number, number) for number in range(6)]
    expected = [[Reference(model)(prompt, 24) for prompt in prompts] for model in models]

    async def serve() -> list[list[list[int]]]:
        engines = [await _start(model, EAGER) for model in models]
        try:
            return await asyncio.gather(*(_complete_all(llm, prompts, 24) for llm in engines))
        finally:
            for llm in engines:
                llm.close()

    assert _run(serve()) == expected


def test_both_start() -> None:
    models = [tiny_model(family) for family in FAMILIES * 2]
    expected = [Reference(model)(prompt_of(20), 8) for model in models]

    async def serve() -> list[list[int]]:
        engines = await asyncio.gather(*(_start(model, EAGER) for model in models))
        try:
            return await asyncio.gather(*(_complete(llm, prompt_of(20), 8) for llm in engines))
        finally:
            for llm in engines:
                llm.close()

    assert _run(serve()) == expected


@pytest.mark.parametrize("shared", [False, True], ids=["another model", "the same model"])
def test_one_starts_while_the_other_runs_requests(shared: bool) -> None:
    serving = tiny_model("llama")
    starting = serving if shared else tiny_model("olmo2")
    expected, others = Reference(serving)(prompt_of(20), 40), Reference(starting)(prompt_of(9), 8)

    async def serve() -> tuple[list[list[int]], list[int]]:
        first = await _start(serving, EAGER)
        start = asyncio.ensure_future(_start(starting, EAGER))
        try:
            found = await _until(start, first, prompt_of(20), 40)
            later = asyncio.ensure_future(_complete(await start, prompt_of(9), 8))
            return found + await _until(later, first, prompt_of(20), 40), await later
        finally:
            first.close()
            (await start).close()

    found, other = _run(serve())
    assert found == [expected] * len(found)
    assert other == others


def test_one_compiles_while_the_other_runs_eagerly_and_captures() -> None:
    """A capture of one waits for the other's start, or that start waits for it."""
    models = [tiny_model(family) for family in FAMILIES]
    expected = [Reference(model)(prompt_of(20), 12) for model in models]
    buckets = {"decode": [], "prefill": [48], "samplers": ["greedy"]}
    lazy, at_start = (
        small_config(buckets=buckets, compile={"capture": capture}) for capture in ("lazy", "start")
    )

    async def serve() -> None:
        first = await _start(models[0], lazy)
        start = asyncio.ensure_future(_start(models[1], at_start))
        try:
            found = await _until(start, first, prompt_of(20), 12)
            second = await start
            while await first.call(lambda llm: llm.model_runner.capture_pending):
                found.append(await _complete(first, prompt_of(20), 12))
            both = await asyncio.gather(
                *(_complete(llm, prompt_of(20), 12) for llm in (first, second))
            )
            assert [*found, *both] == [*[expected[0]] * len(found), *expected]
            for llm in (first, second):
                report = await llm.report()
                assert [
                    (b.state in ("compiled", "graph"), b.failure, b.replays > 0)
                    for b in report.buckets
                ] == [(True, None, True)]
        finally:
            first.close()
            (await start).close()

    _run(serve())


def test_steps_go_on_while_another_engine_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a lazy capture waits for it; an idle engine still handles calls."""
    monkeypatch.setitem(warmup.DISPATCHES, "direct", _uncompiled)
    model = tiny_model("llama")
    expected = Reference(model)(prompt_of(20), 12)
    config = small_config(buckets={"decode": [], "prefill": [48]}, compile={"capture": "lazy"})

    async def serve() -> None:
        llm = await _start(model, config)
        try:
            with COMPILER_LOCK:  # held by this thread, not the engine's
                for _ in range(3):
                    assert await _complete(llm, prompt_of(20), 12) == expected
                assert await llm.call(
                    lambda engine: (
                        engine.model_runner.capture_pending
                        and not engine.model_runner.maybe_capture(
                            prompts_pending=False, steps_in_flight=True
                        )
                    )
                )
                assert [bucket.state for bucket in (await llm.report()).buckets] == ["pending"]
            while await llm.call(lambda engine: engine.model_runner.capture_pending):
                await asyncio.sleep(0.01)
            assert [bucket.state for bucket in (await llm.report()).buckets] == ["compiled"]
        finally:
            llm.close()

    _run(serve())


def test_compilations_of_another_engine_are_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A launch that cannot compile is not charged with compilations that run meanwhile.

    While one that can compile runs, nothing else compiles.
    """

    def _while_another_compiles(
        step: Step, *arguments: object, guarded: bool, **options: object
    ) -> CompiledStep:
        def compile_other(*, blocking: bool) -> None:
            if COMPILER_LOCK.acquire(blocking=blocking):
                counters["stats"]["unique_graphs"] += 1
                COMPILER_LOCK.release()

        def launch() -> None:
            other = threading.Thread(target=partial(compile_other, blocking=not guarded))
            other.start()
            step()
            other.join()

        now = Timestamp.now()
        return CompiledStep(
            launch=launch,
            graph=False,
            guarded=guarded,
            recording=None,
            function=None,
            seconds=durations(now, now, now),
        )

    model = tiny_model("llama")
    expected = Reference(model)(prompt_of(20), 4)
    config = small_config(buckets={"decode": [], "prefill": [48]}, strict=True)
    for guarded in (False, True):
        monkeypatch.setitem(
            warmup.DISPATCHES, "direct", partial(_while_another_compiles, guarded=guarded)
        )
        before = counters["stats"]["unique_graphs"]
        with CompiledLLM(model, None, config, progress=False) as llm:
            assert greedy(llm, [prompt_of(20)], 4) == [expected]
            assert not any(llm.report().graph_events.values())
        assert (counters["stats"]["unique_graphs"] > before) == (not guarded)


def test_a_failed_step_leaves_no_context() -> None:
    model = tiny_model("llama")

    def fail(*_: object) -> None:
        raise MemoryError("injected")

    with CompiledLLM(model, None, EAGER, progress=False) as llm:
        hook = model.lm_head.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError, match="injected"):
            greedy(llm, [prompt_of(20)], 4)
        hook.remove()
        with pytest.raises(RuntimeError, match="belongs to a CompiledLLM"):
            model(torch.tensor([[1, 2, 3]], device=model.device), use_cache=False)
