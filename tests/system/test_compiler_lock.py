"""The locks of engines in several threads."""

import json
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from compiled_llm.config.schema import ModelConfig
from compiled_llm.models.attention import ATTENTION_NAME, AttentionCall
from compiled_llm.models.attention_routing import attention_routed
from compiled_llm.models.loading import load
from compiled_llm.models.probe import probing
from compiled_llm.runtime.compilation.compiler import _compiler_settings
from compiled_llm.runtime.compilation.fx_patches import thread_local_fx_patches
from compiled_llm.system.compiler_lock import (
    COMPILER_LOCK,
    compiler_is_free,
    eager_steps_excluded,
    run_eagerly,
    try_compiler_lock,
)
from passes import PassContext, Pipeline
from passes.ops.precompile import compile_without_launching
from tests.helpers.tiny_models import FAMILIES, tiny_model

T = TypeVar("T")


def _elsewhere(function: Callable[[], T]) -> Future[T]:
    """Run a function in a new thread."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def test_steps_run_in_parallel() -> None:
    meeting = threading.Barrier(2, timeout=30)
    both = [_elsewhere(lambda: run_eagerly(meeting.wait)) for _ in range(2)]
    assert sorted(future.result() for future in both) == [0, 1]


def test_a_change_waits_for_a_step_and_steps_wait_for_a_change() -> None:
    began, end, order = threading.Event(), threading.Event(), list[str]()

    def step() -> None:
        began.set()
        assert end.wait(30)
        order.append("step")

    def change() -> None:
        with eager_steps_excluded(), eager_steps_excluded():
            order.append("change begins")
            later.append(_elsewhere(lambda: run_eagerly(lambda: order.append("later step"))))
            with pytest.raises(TimeoutError):
                later[0].result(0.05)
            order.append("change ends")

    later: list[Future[None]] = []
    running = _elsewhere(lambda: run_eagerly(step))
    assert began.wait(30)
    changing = _elsewhere(change)
    try:
        with pytest.raises(TimeoutError):
            changing.result(0.05)
    finally:
        end.set()
    for future in (running, changing):
        future.result(30)
    later[0].result(30)
    assert order == ["step", "change begins", "change ends", "later step"]


def test_an_interrupt_ends_the_wait() -> None:
    began, end = threading.Event(), threading.Event()

    def hold() -> None:
        with COMPILER_LOCK:
            run_eagerly(lambda: (began.set(), end.wait(30)))

    def wait_for_a_change() -> None:
        with eager_steps_excluded():
            pass

    # A background job of a shell ignores the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    holding = _elsewhere(hold)
    assert began.wait(30)
    try:
        for wait in (wait_for_a_change, COMPILER_LOCK.acquire):
            main = threading.main_thread().ident
            assert main is not None
            threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                wait()
    finally:
        end.set()
        signal.signal(signal.SIGINT, handler)
    holding.result(30)
    assert _elsewhere(lambda: run_eagerly(compiler_is_free)).result(30)


def test_a_model_is_examined_while_no_eager_step_runs() -> None:
    """The step may run the same model, whose attention is routed elsewhere meanwhile."""
    model = tiny_model("llama")
    steps: list[Future[str]] = []

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        if not steps:
            steps.append(_elsewhere(lambda: run_eagerly(lambda: model.config._attn_implementation)))
            with pytest.raises(TimeoutError):
                steps[0].result(0.05)
        return v.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])

    with attention_routed(model):
        with probing(model, attend):
            model(torch.tensor([[1, 2]], device=model.device), use_cache=False)
        assert steps[0].result(30) == ATTENTION_NAME


def test_a_failed_step_excludes_nothing() -> None:
    def fail() -> None:
        raise MemoryError("injected")

    with pytest.raises(MemoryError, match="injected"):
        run_eagerly(fail)

    def change() -> bool:
        with eager_steps_excluded():
            return True

    assert _elsewhere(change).result(30)


def test_a_compilation_holds_the_lock() -> None:
    pipeline = Pipeline(passes=[], context=PassContext(num_tokens=1))
    with _compiler_settings(torch.device("cpu"), pipeline, {}):
        assert compiler_is_free()  # for this thread
        assert not _elsewhere(compiler_is_free).result(30)

        def try_lock() -> bool:
            with try_compiler_lock() as free:
                return free

        assert not _elsewhere(try_lock).result(30)
    assert _elsewhere(try_lock).result(30)


def test_a_model_is_built_while_no_eager_step_runs(tmp_path: Path) -> None:
    """transformers sets the default dtype, which threads share, to that of the model."""
    began, end = threading.Event(), threading.Event()
    values = {
        **FAMILIES["llama"],
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 1,
    }
    (tmp_path / "config.json").write_text(
        json.dumps({**values, "hidden_size": 32, "vocab_size": 64, "intermediate_size": 32})
    )

    def step() -> set[torch.dtype]:
        began.set()
        seen = set[torch.dtype]()
        while not end.is_set():
            seen.add(torch.get_default_dtype())
        return seen

    running = _elsewhere(lambda: run_eagerly(step))
    assert began.wait(30)
    wanted = ModelConfig(
        name=str(tmp_path / "config.json"), weights="random", dtype="bfloat16", device="cpu"
    )
    loading = _elsewhere(lambda: load(wanted))
    try:
        with pytest.raises(TimeoutError):
            loading.result(0.5)
        assert not compiler_is_free()
    finally:
        end.set()
    assert running.result(30) == {torch.float32}
    assert loading.result(60).model.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    assert COMPILER_LOCK.acquire(timeout=30)
    COMPILER_LOCK.release()


def test_a_trace_does_not_affect_other_threads() -> None:
    """An eager step in another thread calls modules that are not in the trace."""
    calls: list[Tensor] = []
    traced, other = nn.Sequential(nn.ReLU()), nn.ReLU()

    class Tracer(torch.fx.Tracer):
        def call_module(
            self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
        ) -> Any:
            calls.append(_elsewhere(lambda: other(torch.ones(1))).result(30))
            return super().call_module(module, forward, args, kwargs)

    with thread_local_fx_patches():
        graph = Tracer().trace(traced)
    assert [float(call) for call in calls] == [1.0]
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]


def test_precompiling_kernels_does_not_affect_other_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton.runtime.jit import JITFunction

    launched: list[bool] = []

    def run(self: object, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        launched.append(warmup)

    monkeypatch.setattr(JITFunction, "run", run)
    with compile_without_launching({}):
        _elsewhere(lambda: JITFunction.run(object(), grid=(1,), warmup=False)).result(30)
    assert launched == [False]
