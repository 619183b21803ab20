"""Lazy capture: steps run at once, with the right tokens, and needed buckets are captured."""

import asyncio
import os
from pathlib import Path

import pytest

from compiled_llm import AsyncCompiledLLM, CompiledLLM, SamplingParams
from compiled_llm.config.loader import parse_config
from compiled_llm.runtime.artifacts.artifact import Artifact, SavedBucket
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.capture import warmup
from compiled_llm.runtime.capture.captured_bucket import CapturedBucket
from compiled_llm.runtime.capture.lazy import LazyBuckets, pending_buckets
from compiled_llm.runtime.compilation.compiler import CompiledStep
from compiled_llm.runtime.compilation.timing import Timestamp, durations
from compiled_llm.runtime.step.step import Step
from tests.helpers.tiny_models import Reference, greedy, prompt_of, small_config, tiny_model
from tests.model_sweep.tiny_configs import tiny_config
from tests.model_sweep.tiny_model import tiny_model as random_model

LAZY = {"compile": {"capture": "lazy"}}


class _Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_most_needed_bucket_is_built_first_and_steps_get_as_much_time() -> None:
    clock, made = _Clock(), list[str]()

    def make(bucket: Bucket) -> CapturedBucket:
        clock.now += 5
        made.append(str(bucket))
        return pending_buckets([bucket])[0]

    lazy = LazyBuckets(make, clock=clock)
    assert not lazy.has_demand
    assert not lazy.is_due
    for size, times in ((2, 3), (4, 5), (8, 3)):
        for _ in range(times):
            lazy.record_demand(Bucket("decode", size))
    assert lazy.is_due
    assert not lazy.is_overdue
    clock.now += 5.1
    assert lazy.is_overdue
    lazy.build_next()
    assert lazy.has_demand
    clock.now += 4.9
    assert not lazy.is_due
    clock.now += 0.2
    assert lazy.is_due
    lazy.build_next()
    lazy.build_next()
    assert made == ["decode-4-greedy", "decode-8-greedy", "decode-2-greedy"]
    assert not lazy.has_demand
    clock.now += 10
    assert not lazy.is_due


def test_strict_and_lazy_are_refused() -> None:
    with pytest.raises(ValueError, match=r"with compile\.capture=lazy the first steps are eager"):
        parse_config({"strict": True, **LAZY})


def test_steps_run_at_once_and_needed_buckets_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between steps of requests, whose tokens, logprobs and penalties do not change."""
    made: list[int] = []
    direct = warmup.DISPATCHES["direct"]

    def counting(step, *arguments, **options):  # type: ignore[no-untyped-def]
        made.append(step.size)
        return direct(step, *arguments, **options)

    monkeypatch.setitem(warmup.DISPATCHES, "direct", counting)
    model = tiny_model("llama")
    reference = Reference(model)
    prompts = [prompt_of(20), prompt_of(7)]
    full = SamplingParams(
        temperature=1, seed=3, presence_penalty=0.5, logprobs=2, max_tokens=40, ignore_eos=True
    )
    with CompiledLLM(
        model, None, small_config(compile={"dispatch": "eager"}), progress=False
    ) as llm:
        expected = llm.generate([prompt_of(9)], full)[0].outputs[0]
    config = small_config(
        buckets={"decode": [2], "prefill": [48], "samplers": ["full"]}, verify=True, **LAZY
    )
    with CompiledLLM(model, None, config, progress=False) as llm:
        report = llm.report()
        assert {bucket.state for bucket in report.buckets} == {"pending"}
        assert made == []
        got = llm.generate([prompt_of(9)], full)[0].outputs[0]
        assert (got.token_ids, len(made) > 0) == (expected.token_ids, True)
        for mine, others in zip(got.logprobs or [], expected.logprobs or [], strict=True):
            assert mine.keys() == others.keys()
        assert set(report.fallbacks) == {
            f"{bucket} is not captured yet: compile.capture is lazy"
            for bucket in ("prefill-48-full", "decode-2-full")
        }
        while llm.model_runner.capture_pending:
            llm.model_runner.capture_next()
        assert sorted(made) == [2, 48]
        eager = report.fallbacks.total()
        assert greedy(llm, prompts, 8) == [reference(prompt, 8) for prompt in prompts]
        assert report.fallbacks.total() == eager
        buckets = {bucket.bucket: bucket for bucket in report.buckets}
        assert (buckets["decode-4-full"].state, buckets["decode-4-full"].failure) == (
            "pending",
            "compile.capture is lazy",
        )
        for name in ("decode-2-full", "prefill-48-full"):
            assert (
                buckets[name].state == "pending",
                buckets[name].failure,
                buckets[name].replays > 0,
            ) == (False, None, True)
            assert buckets[name].verification is not None


def test_recurrent_states_survive_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of padding does not change the states of running requests."""
    monkeypatch.setitem(warmup.DISPATCHES, "direct", _uncompiled)
    model = random_model(tiny_config("lfm2"))
    reference, prompts = Reference(model), [prompt_of(20), prompt_of(7), prompt_of(30)]
    config = small_config(
        buckets={"decode": [1, 2, 4], "prefill": [48], "samplers": ["greedy"]}, **LAZY
    )
    with CompiledLLM(model, None, config, progress=False) as llm:
        assert greedy(llm, prompts, 12) == [reference(prompt, 12) for prompt in prompts]
        captured = [bucket for bucket in llm.report().buckets if bucket.state != "pending"]
        assert captured


def _uncompiled(step: Step, *arguments: object, **options: object) -> CompiledStep:
    now = Timestamp.now()
    for _ in range(2):
        step()
    return CompiledStep(
        launch=step, graph=False, recording=None, function=None, seconds=durations(now, now, now)
    )


def test_an_idle_engine_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(warmup.DISPATCHES, "direct", _uncompiled)
    # While requests run, nothing is captured.
    monkeypatch.setattr(LazyBuckets, "is_due", property(lambda lazy: False))
    config = small_config(buckets={"decode": [], "prefill": [16]}, **LAZY)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)

    async def serve() -> dict[str, str]:
        llm = AsyncCompiledLLM(
            lambda: CompiledLLM(tiny_model("llama"), None, config, progress=False)
        )
        try:
            stream = await llm.add_request(prompt_of(9), params, streaming=False)
            async for output in stream:
                assert len(output.outputs[0].token_ids) == 4
            while await llm.call(lambda engine: engine.model_runner.capture_pending):
                await asyncio.sleep(0.01)
            return await llm.call(
                lambda engine: {bucket.bucket: bucket.state for bucket in engine.report().buckets}
            )
        finally:
            llm.close()

    assert asyncio.run(serve()) == {"prefill-16-greedy": "compiled", "prefill-48-greedy": "pending"}


def test_a_bucket_that_fails_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def failing(step: Step, *arguments: object, **options: object) -> CompiledStep:
        tried.append(step.size)
        if step.size == 2:
            raise MemoryError("injected")
        return _uncompiled(step)

    monkeypatch.setitem(warmup.DISPATCHES, "direct", failing)
    model = tiny_model("llama")
    reference = Reference(model)
    with CompiledLLM(model, None, small_config(**LAZY), progress=False) as llm:
        for _ in range(3):
            assert greedy(llm, [prompt_of(5)], 10) == [reference(prompt_of(5), 10)]
        while llm.model_runner.capture_pending:
            llm.model_runner.capture_next()
        assert greedy(llm, [prompt_of(5)], 10) == [reference(prompt_of(5), 10)]
        report = llm.report()
    assert sorted(tried) == [2, 4, 16]
    assert (
        report.stand_ins["decode-2-greedy failed: MemoryError: injected; decode-4-greedy served"]
        >= 9
    )
    assert {bucket.bucket: bucket.state for bucket in report.buckets} == {
        "prefill-16-greedy": "compiled",
        "prefill-48-greedy": "pending",
        "decode-2-greedy": "failed",
        "decode-4-greedy": "compiled",
    }


def test_a_capture_delays_no_token_that_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor does it interrupt a prompt, which takes three steps here."""
    made: list[int] = []

    def counting(step: Step, *arguments: object, **options: object) -> CompiledStep:
        made.append(step.size)
        return _uncompiled(step)

    monkeypatch.setitem(warmup.DISPATCHES, "direct", counting)
    # The time that the last bucket took is ignored.
    monkeypatch.setattr(LazyBuckets, "is_due", LazyBuckets.has_demand)
    config = small_config(buckets={"decode": [2], "prefill": [16], "samplers": ["full"]}, **LAZY)
    with CompiledLLM(tiny_model("llama"), None, config, progress=False) as llm:
        for count, then_made in ((1, []), (6, [48, 16, 2])):
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=1)
            (request,) = llm._runner.processor.process(prompt_of(100), params).requests
            llm.engine.add_request(request)
            while request not in llm.engine.step():
                pass
            assert (len(request.token_ids), made) == (1, [])
            while request.finish_reason is None:
                llm.engine.step()
            assert made == then_made


def test_an_artifact_in_use_is_marked_as_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if nothing is loaded from it yet."""
    monkeypatch.setenv("COMPILED_LLM_CACHE", str(tmp_path))
    config = small_config(compile={"capture": "lazy", "artifact": "auto"})
    for start in range(2):
        with CompiledLLM(tiny_model("llama"), None, config, progress=False) as llm:
            manifest = Path(str(llm.report().facts["artifact"])) / "manifest.json"
            if start == 0:
                Artifact(manifest.parent, llm.model_runner.fingerprint()).save(
                    "decode-9-greedy", SavedBucket(step=b"", passes=[])
                )
                os.utime(manifest, (0, 0))
    assert manifest.stat().st_mtime > 0
