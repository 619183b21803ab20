"""What only a GPU can show: one launch a step, nothing recorded twice, and graphs that say what eager says."""

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from compiled_llm import CompiledLLM
from compiled_llm.runtime.runtime import Runtime
from tests.tiny import Reference, greedy, poison, prompt_of, small_config, tiny_model


def _launches(run) -> Counter[str]:  # type: ignore[no-untyped-def]
    """Calls of the CUDA API that give the device work."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    names = ("cudaGraphLaunch", "cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpy", "cudaMemset")
    counts: Counter[str] = Counter()
    for event in profiled.events():
        counts.update(name for name in names if event.name.startswith(name))
    return counts


def _start_decoding(runtime: Runtime, lengths: list[int]) -> None:
    from compiled_llm.runtime.state import PrefillChunk

    for row, length in enumerate(lengths):
        runtime.join(row, pages=[1 + 8 * row + i for i in range(8)], temperature=0.0, seed=0)
        runtime.prefill([PrefillChunk(row=row, tokens=prompt_of(length), start=0)])
    runtime.activate(range(len(lengths)))


def test_a_decode_step_is_one_graph_launch() -> None:
    with CompiledLLM(tiny_model("llama"), None, small_config(), progress=False) as llm:
        runtime = llm._runtime
        _start_decoding(runtime, [20, 7, 33])
        for num_rows in (1, 2, 3, 4):
            assert _launches(lambda n=num_rows: runtime.decode(n)) == Counter({"cudaGraphLaunch": 1}), f"{num_rows} rows"
        report = llm.report()
        assert report.graphs == len(report.buckets) == 4
        assert {bucket.mode for bucket in report.buckets} == {"graph"}
        assert report.graph_events == {"graph skips": 0, "recompiles": 0, "re-records": 0}


def test_a_prefill_step_is_one_copy_and_one_graph_launch() -> None:
    from compiled_llm.runtime.state import PrefillChunk

    with CompiledLLM(tiny_model("llama"), None, small_config(), progress=False) as llm:
        runtime = llm._runtime
        runtime.join(0, pages=[1, 2, 3], temperature=0.0, seed=0)
        launches = _launches(lambda: runtime.prefill([PrefillChunk(row=0, tokens=prompt_of(30), start=0)]))
        assert launches == Counter({"cudaGraphLaunch": 1, "cudaMemcpy": 1})


@pytest.mark.parametrize("dispatch", ["direct", "torch"])
def test_replay_equals_eager_as_lengths_tables_and_batches_change(dispatch: str) -> None:
    batches = [[5], [16, 1], [15, 17, 16], [31, 32, 33, 1], [60, 3]]
    prompts = [[prompt_of(length, seed) for length in lengths] for seed, lengths in enumerate(batches)]
    model = tiny_model("qwen3")
    reference = Reference(model)
    tokens = {}
    for mode in (dispatch, "eager"):
        with CompiledLLM(model, None, small_config(compile={"dispatch": mode}), progress=False) as llm:
            tokens[mode] = []
            for batch in prompts:
                poison(llm)
                tokens[mode].append(greedy(llm, batch, 20))
            report = llm.report()
            assert not any(report.graph_events.values())
            assert bool(report.fallbacks) == (mode == "eager")
    assert tokens[dispatch] == tokens["eager"]
    assert tokens[dispatch] == [[reference(prompt, 20) for prompt in batch] for batch in prompts]


def test_a_failed_capture_leaves_the_other_graphs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits for the device inside one bucket's forward, which no capture survives."""
    from compiled_llm.runtime import dispatch, warmup
    from compiled_llm.runtime.step import Step

    direct = dispatch.direct

    def failing(step: Step, *arguments: object) -> object:
        if step.size == 4:
            raise RuntimeError("injected")
        return direct(step, *arguments)

    monkeypatch.setitem(warmup.DISPATCHES, "direct", failing)
    model = tiny_model("llama")
    reference = Reference(model)
    with CompiledLLM(model, None, small_config(), progress=False) as llm:
        prompts = [prompt_of(length) for length in (5, 9, 30)]
        assert greedy(llm, prompts, 20) == [reference(prompt, 20) for prompt in prompts]
        report = llm.report()
        assert [bucket.mode for bucket in report.buckets] == ["graph", "graph", "graph", "eager"]
        assert list(report.fallbacks) == ["decode-4 failed: RuntimeError: injected"]
