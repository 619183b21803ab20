"""Each external call of a step raises once; afterwards tokens are right and no block is lost."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from compiled_llm import AsyncCompiledLLM, CompiledLLM, SamplingParams
from compiled_llm.engine.block_pool import BlockPool
from compiled_llm.engine.engine_core import EngineCore
from compiled_llm.errors import EngineBrokenError
from compiled_llm.runtime.memory.allocation import Memory
from compiled_llm.runtime.model_runner import ModelRunner
from compiled_llm.runtime.step.buffers import StepBuffers, _StagingBuffer
from compiled_llm.runtime.step.readback import Readback
from compiled_llm.runtime.step.sampler_state import SamplerState
from compiled_llm.runtime.step.step import DecodeStep, PrefillStep
from tests.faults.injection import failing_call
from tests.helpers.tiny_models import Reference, greedy, prompt_of, small_config, tiny_model

pytestmark = pytest.mark.gpu

# Calls of a step outside of the engine: allocations, copies, launches, waits and reads.
CALLS: dict[str, tuple[Any, str]] = {
    "pages": (BlockPool, "allocate"),
    "shared pages": (BlockPool, "touch"),
    "copy of a decode batch": (StepBuffers, "stage_decode"),
    "copy of a prefill batch": (StepBuffers, "stage_prefill"),
    "pinned copy": (_StagingBuffer, "copy_to"),
    "event": (_StagingBuffer, "wait"),
    "allocation of a step": (Memory, "step"),
    "decode launch": (DecodeStep, "forward"),
    "prefill launch": (PrefillStep, "forward"),
    "readback": (Readback, "start"),
    "tokens": (Readback, "tokens"),
    "logprobs": (Readback, "logprobs"),
    "extras": (SamplerState, "write"),
    "prompt logprobs": (ModelRunner, "prompt_logprobs"),
    "logits for a processor": (ModelRunner, "logits"),
    "choice after a processor": (ModelRunner, "sample_from_logits"),
}
ERRORS = [torch.OutOfMemoryError, OSError, KeyboardInterrupt]
PARAMS = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
PROMPTS = [prompt_of(17 + 7 * number, number) for number in range(5)]


def _leave_alone(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return logits


def _params() -> list[SamplingParams]:
    """Return parameters for each kind of step."""
    others: list[dict[str, Any]] = [
        {},
        {"logprobs": 1},
        {"prompt_logprobs": 1},
        {"logit_bias": {5: 0.0}},
        {"logits_processors": [_leave_alone]},
    ]
    return [SamplingParams(**{**PARAMS, **more}) for more in others]


@pytest.fixture(scope="module")
def want() -> list[list[int]]:
    reference = Reference(tiny_model("llama"))
    return [reference(prompt, 12) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def llm() -> Iterator[CompiledLLM]:
    with CompiledLLM(
        tiny_model("llama"), None, small_config(compile={"dispatch": "eager"}), progress=False
    ) as engine:
        yield engine


def _tokens(llm: CompiledLLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, _params())]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", CALLS)
def test_a_step_whose_call_fails(
    llm: CompiledLLM, want: list[list[int]], call: str, after: bool
) -> None:
    owner, name = CALLS[call]
    free = llm.engine.cache.num_free_blocks
    assert _tokens(llm) == want  # so that all runs below find the same blocks shared
    with failing_call(owner, name, -1, OSError) as calls:
        assert _tokens(llm) == want
    assert calls[0], "the call is not made"
    for turn, number in enumerate(
        sorted({0, 1, calls[0] // 2, calls[0] - 1} & set(range(calls[0])))
    ):
        error = ERRORS[turn % len(ERRORS)]
        with failing_call(owner, name, number, error, after=after), pytest.raises(error):
            _tokens(llm)
        assert _tokens(llm) == want
        llm.engine.cache.check()
        assert llm.engine.cache.num_free_blocks == free
        assert not llm.engine.has_work


def test_a_device_that_does_not_recover_breaks_the_engine() -> None:
    """All requests end with an error, and further calls except `close` are refused."""
    with CompiledLLM(
        tiny_model("llama"), None, small_config(compile={"dispatch": "eager"}), progress=False
    ) as llm:
        group = llm._runner.processor.process(prompt_of(9), SamplingParams(**PARAMS))
        llm.engine.add_request(group.requests[0])
        with (
            failing_call(DecodeStep, "forward", 0, RuntimeError),
            failing_call(Readback, "resynchronize", 0, RuntimeError),
            pytest.raises(RuntimeError, match="injected"),
        ):
            greedy(llm, PROMPTS, 12)
        assert group.requests[0].finish_reason == "error"
        assert llm.engine.broken is not None
        for call in (lambda: greedy(llm, PROMPTS, 12), llm.engine.step, llm.reset_prefix_cache):
            with pytest.raises(
                EngineBrokenError,
                match=r"this engine is broken: after RuntimeError: injected it could not recover",
            ):
                call()


def test_steps_that_fail_for_no_request_break_the_engine() -> None:
    with CompiledLLM(
        tiny_model("llama"), None, small_config(compile={"dispatch": "eager"}), progress=False
    ) as llm:
        group = llm._runner.processor.process(prompt_of(9), SamplingParams(**PARAMS))
        llm.engine.add_request(group.requests[0])
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(EngineCore, "_abort_overdue", _raise)
            for _ in range(4):
                with pytest.raises(ZeroDivisionError):
                    llm.engine.step()
            with pytest.raises(EngineBrokenError, match="its steps fail although no request runs"):
                llm.engine.step()
        assert group.requests[0].finish_reason == "error"


def _raise(*_: object) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, SystemExit])
@pytest.mark.parametrize(
    ("owner", "name"), [(DecodeStep, "forward"), (PrefillStep, "forward"), (Readback, "tokens")]
)
def test_an_asynchronous_engine_outlives_a_step(
    owner: Any, name: str, error: type[BaseException], want: list[list[int]]
) -> None:
    """Requests of the failed step end with an error; all others get their tokens."""

    async def one(
        llm: AsyncCompiledLLM, prompt: list[int]
    ) -> tuple[list[int], str | None, str | None]:
        *_, last = [
            output async for output in await llm.add_request(prompt, SamplingParams(**PARAMS))
        ]
        done = last.outputs[0]
        return done.token_ids, done.finish_reason, done.error

    async def main() -> None:
        config = small_config(compile={"dispatch": "eager"})
        async with AsyncCompiledLLM(
            lambda: CompiledLLM(tiny_model("llama"), None, config, progress=False)
        ) as llm:
            with failing_call(owner, name, 3, error):
                found = await asyncio.wait_for(
                    asyncio.gather(*(one(llm, prompt) for prompt in PROMPTS)), 60
                )
            failed = [why for _, reason, why in found if reason == "error"]
            assert 1 <= len(failed) <= 4, "of five, four run at once"
            assert all(why is not None and f"{error.__name__}: injected" in why for why in failed)
            for (tokens, reason, _), right in zip(found, want, strict=True):
                assert reason == "error" or tokens == right
            again = await asyncio.wait_for(
                asyncio.gather(*(one(llm, prompt) for prompt in PROMPTS)), 60
            )
            assert [tokens for tokens, _, _ in again] == want

    with pytest.warns(UserWarning, match="a step failed"):
        asyncio.run(main())


def test_a_processor_that_exits_ends_its_request_alone(
    llm: CompiledLLM, want: list[list[int]]
) -> None:
    def leave(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        raise SystemExit(3)

    params = [SamplingParams(**PARAMS), SamplingParams(**PARAMS, logits_processors=[leave])]
    plain, leaving = llm.generate(PROMPTS[:2], params)
    assert plain.outputs[0].token_ids == want[0]
    assert (leaving.outputs[0].finish_reason, leaving.outputs[0].error) == (
        "error",
        "SystemExit: 3",
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm.generate([5, 6]),
        lambda llm: llm.close(),
        lambda llm: llm.reset_prefix_cache(),
        lambda llm: llm.engine.step(),
    ],
)
def test_an_engine_is_not_called_from_within_a_step(
    llm: CompiledLLM, want: list[list[int]], call: Callable[[CompiledLLM], object]
) -> None:
    def meddle(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        call(llm)
        return logits

    params = [SamplingParams(**PARAMS), SamplingParams(**PARAMS, logits_processors=[meddle])]
    plain, meddling = llm.generate(PROMPTS[:2], params)
    assert plain.outputs[0].token_ids == want[0]
    assert meddling.outputs[0].finish_reason == "error"
    assert "in a step" in str(meddling.outputs[0].error)
    assert not llm.engine.has_work


def test_an_abort_from_within_a_step_waits_for_its_end(
    llm: CompiledLLM, want: list[list[int]]
) -> None:
    """A finalizer may abort a request at any point of a step."""
    other = llm._runner.processor.process(PROMPTS[0], SamplingParams(**PARAMS))
    llm.engine.add_request(other.requests[0])

    def abort(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        llm.engine.abort(other.requests[0])
        return logits

    (output,) = llm.generate([PROMPTS[1]], SamplingParams(**PARAMS, logits_processors=[abort]))
    assert output.outputs[0].token_ids == want[1]
    assert other.requests[0].finish_reason == "abort"
    llm.engine.cache.check()
