"""Buckets are built in order; one that fails does not affect the others."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from compiled_llm import CompiledLLM
from compiled_llm.errors import StrictError
from compiled_llm.report.report import BucketState, Report
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.build_context import BuildContext
from compiled_llm.runtime.capture import warmup
from compiled_llm.runtime.capture.graph_budget import GraphBudget
from compiled_llm.runtime.capture.warmup import compile_buckets
from compiled_llm.runtime.compilation.compiler import CompiledStep
from compiled_llm.runtime.compilation.timing import Timestamp, durations
from compiled_llm.runtime.step.step import Step
from passes import PassError
from tests.helpers.tiny_models import small_config, tiny_model

BUCKETS = [Bucket("decode", 1), Bucket("decode", 4), Bucket("prefill", 16), Bucket("prefill", 48)]


class _Compiler:
    """Replaces compilation: records the sizes, and raises the errors that it is given by size."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.errors: dict[int, BaseException] = {}

    def __call__(self, step: Step, *arguments: object, **options: object) -> CompiledStep:
        self.sizes.append(step.size)
        if step.size in self.errors:
            raise self.errors[step.size]
        now = Timestamp.now()
        return CompiledStep(
            launch=step,
            graph=False,
            recording=None,
            function=None,
            seconds=durations(now, now, now),
        )


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> _Compiler:
    compiler = _Compiler()
    monkeypatch.setitem(warmup.DISPATCHES, "direct", compiler)
    return compiler


@pytest.fixture(scope="module")
def engine_context() -> Iterator[BuildContext]:
    config = small_config(compile={"dispatch": "eager"})
    with CompiledLLM(tiny_model("llama"), None, config, progress=False) as llm:
        yield llm.model_runner.context


@pytest.fixture
def context(engine_context: BuildContext) -> BuildContext:
    return replace(engine_context, config=small_config(), report=Report())


def _states(context: BuildContext, **options: object) -> dict[str, str]:
    built = compile_buckets(BUCKETS, context, progress=False, **options)  # type: ignore[arg-type]
    assert [entry.bucket for entry in built] == BUCKETS
    assert all((entry.compiled is None) != (entry.report.failure is None) for entry in built)
    return {str(entry.bucket): str(entry.report.state) for entry in built}


def test_buckets_are_built_large_to_small(compiler: _Compiler, context: BuildContext) -> None:
    assert set(_states(context).values()) == {BucketState.COMPILED}
    assert compiler.sizes == [48, 16, 4, 1]
    assert not context.report.warnings


def test_a_failure_affects_its_bucket_alone(compiler: _Compiler, context: BuildContext) -> None:
    compiler.errors[16] = MemoryError("injected\nmore lines")
    compiler.errors[4] = RuntimeError()
    built = compile_buckets(BUCKETS, context, progress=False)
    assert compiler.sizes == [48, 16, 4, 1]
    assert [entry.report.failure for entry in built] == [
        None,
        "RuntimeError: no message",
        "MemoryError: injected",
        None,
    ]
    assert [entry.report.state for entry in built] == [
        BucketState.COMPILED,
        BucketState.FAILED,
        BucketState.FAILED,
        BucketState.COMPILED,
    ]


def test_strict_makes_a_failure_an_error(compiler: _Compiler, context: BuildContext) -> None:
    compiler.errors[16] = MemoryError("injected")
    strict = replace(context, config=small_config(strict=True))
    with pytest.raises(StrictError, match="prefill-16-greedy could not be compiled: MemoryError"):
        compile_buckets(BUCKETS, strict, progress=False)
    assert compiler.sizes == [48, 16]


def test_an_error_of_a_pass_is_raised(compiler: _Compiler, context: BuildContext) -> None:
    """Inductor wraps it in errors of its own."""
    wrapped = RuntimeError("backend compiler failed")
    wrapped.__cause__ = PassError("expected 2 matches")
    compiler.errors[48] = wrapped
    with pytest.raises(PassError, match="expected 2 matches"):
        compile_buckets(BUCKETS, context, progress=False)


def test_unknown_inductor_options_are_refused(compiler: _Compiler, context: BuildContext) -> None:
    options = {"compile": {"options": {"max_autotun": True}}}
    with pytest.raises(ValueError, match="Inductor has no option 'max_autotun'"):
        compile_buckets(BUCKETS, replace(context, config=small_config(**options)), progress=False)
    assert not compiler.sizes


def test_what_exceeds_the_budget_is_left_out(
    compiler: _Compiler, context: BuildContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each graph takes as many bytes as its step has tokens."""
    live: list[int] = []
    direct = warmup.DISPATCHES["direct"]

    def record(step: Step, *arguments: object, **options: object) -> CompiledStep:
        live.append(step.size)
        return direct(step, *arguments, **options)  # type: ignore[arg-type]

    def release(compiled: CompiledStep, device: torch.device) -> None:
        live.pop()

    monkeypatch.setitem(warmup.DISPATCHES, "direct", record)
    monkeypatch.setattr(warmup, "graph_bytes", lambda device: sum(live))
    monkeypatch.setattr(warmup, "release", release)
    limited = replace(context, config=small_config(memory={"graphs": 60}))
    budget = GraphBudget(60, lambda: sum(live))
    assert _states(limited, budget=budget) == {
        "decode-1-greedy": BucketState.COMPILED,
        "decode-4-greedy": BucketState.COMPILED,
        "prefill-16-greedy": BucketState.LEFT_OUT,
        "prefill-48-greedy": BucketState.COMPILED,
    }
    assert sum(live) == budget.used == 53
    (warning,) = context.report.warnings
    assert warning == (
        "memory.graphs has no space for prefill-16-greedy: "
        "their steps run in larger buckets, or eagerly"
    )
