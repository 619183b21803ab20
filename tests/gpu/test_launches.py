"""What only a GPU can show: one launch a step, nothing recorded twice, and graphs that say what eager says."""

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from compiled_llm import CompiledLLM
from compiled_llm.runtime import step
from compiled_llm.runtime.dispatch import graph_events, graph_pool
from compiled_llm.runtime.runtime import Runtime
from compiled_llm.runtime.state import PrefillChunk
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
    for row, length in enumerate(lengths):
        runtime.join(row, pages=[1 + 8 * row + i for i in range(8)], temperature=0.0, seed=0)
        runtime.prefill([PrefillChunk(row=row, tokens=prompt_of(length), start=0)])
    runtime.activate(range(len(lengths)))


def test_a_decode_step_is_one_graph_launch() -> None:
    with CompiledLLM(tiny_model("llama"), None, small_config(), progress=False) as llm:
        runtime = llm.runtime
        _start_decoding(runtime, [20, 7, 33])
        for num_rows in (1, 2, 3, 4):
            assert _launches(lambda n=num_rows: runtime.decode(n)) == Counter({"cudaGraphLaunch": 1}), f"{num_rows} rows"
        report = llm.report()
        assert report.graphs == len(report.buckets) == 4
        assert {bucket.mode for bucket in report.buckets} == {"graph"}
        assert report.graph_events == {"graph skips": 0, "recompiles": 0, "re-records": 0}


def test_a_prefill_step_is_one_copy_and_one_graph_launch() -> None:
    with CompiledLLM(tiny_model("llama"), None, small_config(), progress=False) as llm:
        runtime = llm.runtime
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
            before, tokens[mode] = graph_events(model.device), []
            for batch in prompts:
                poison(llm)
                tokens[mode].append(greedy(llm, batch, 20))
            report = llm.report()
            assert graph_events(model.device) == before
            assert not any(report.graph_events.values())
            assert bool(report.fallbacks) == (mode == "eager")
    assert tokens[dispatch] == tokens["eager"]
    assert tokens[dispatch] == [[reference(prompt, 20) for prompt in batch] for batch in prompts]


@torch.library.custom_op("compiled_llm_tests::wait", mutates_args=())
def wait(x: torch.Tensor) -> torch.Tensor:
    """Waits for the device, which no capture survives."""
    x.sum().item()
    return x.clone()


@wait.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_a_failed_capture_leaves_the_other_graphs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = step.sample

    def failing(logits: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return sample(wait(logits) if logits.shape[0] == 4 else logits, *parameters)

    monkeypatch.setattr(step, "sample", failing)
    model = tiny_model("llama")
    reference = Reference(model)
    # Two prefill buckets of fewer than 4 sequences, and the decode buckets 4 (which fails), 2 and 1.
    config = small_config(
        limits={"max_num_seqs": 4, "max_num_batched_tokens": 3, "max_model_len": 128}, buckets={"decode": [1, 2], "prefill": [2]}
    )
    with CompiledLLM(model, None, config, progress=False) as llm:
        for lengths in ([5, 9, 30], [12], [6, 7], [3, 3, 3, 3]):
            prompts = [prompt_of(length) for length in lengths]
            assert greedy(llm, prompts, 20) == [reference(prompt, 20) for prompt in prompts]
        report = llm.report()
    modes = {bucket.bucket: bucket.mode for bucket in report.buckets}
    failures = [bucket.failure for bucket in report.buckets]
    assert modes == {
        "prefill-2": "graph", "prefill-3": "graph", "decode-1": "graph", "decode-2": "graph", "decode-4": "eager"
    }, failures  # fmt: skip
    (reason,) = report.fallbacks
    assert reason.startswith("decode-4 failed: ")
    assert all(bucket.replays for bucket in report.buckets if bucket.mode == "graph")


def test_closing_gives_the_memory_back() -> None:
    model = tiny_model("llama")
    reserved = []
    for _ in range(3):
        with CompiledLLM(model, None, small_config(), progress=False) as llm:
            greedy(llm, [prompt_of(5)], 4)
            assert graph_pool(model.device)[0] == 4
        assert graph_pool(model.device) == (0, 0)
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[0] == reserved[1] == reserved[2]
