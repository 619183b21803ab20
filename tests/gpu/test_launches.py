"""CUDA graphs: one launch per step, nothing recorded twice, and the results of eager steps."""

import re
import time
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import fresh_cache
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from compiled_llm import CompiledLLM, SamplingParams
from compiled_llm.engine.request import Request
from compiled_llm.runtime.compilation.cuda_graph_trees import graph_events, graph_pool
from compiled_llm.runtime.step import step
from tests.helpers.tiny_models import Reference, greedy, poison, prompt_of, small_config, tiny_model


def _launches(run) -> Counter[str]:  # type: ignore[no-untyped-def]
    """Count the calls of the CUDA API that give the device work."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    names = ("cudaGraphLaunch", "cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpy", "cudaMemset")
    counts: Counter[str] = Counter()
    for event in profiled.events():
        counts.update(name for name in names if event.name.startswith(name))
    return counts


def _add(llm: CompiledLLM, lengths: list[int], **params: Any) -> list[Request]:
    wanted = SamplingParams(**{"temperature": 0, "max_tokens": 60, "ignore_eos": True, **params})
    requests = [
        Request(prompt_token_ids=prompt_of(length), sampling_params=wanted, max_tokens=60, seed=7)
        for length in lengths
    ]
    for request in requests:
        llm.engine.add_request(request)
    return requests


def test_a_step_is_one_graph_launch_one_copy_up_and_one_down() -> None:
    """Prefill copies its inputs; decode does where rows join, leave or reach a new page.

    Each step copies its ids back.
    """
    config = small_config(buckets={"samplers": ["full"]})
    with CompiledLLM(tiny_model("llama"), None, config, progress=False) as llm:
        _add(llm, [20, 7, 33], temperature=0.8, top_p=0.9)
        assert _launches(llm.engine.step) == Counter({"cudaGraphLaunch": 1, "cudaMemcpy": 2})
        while llm.engine.num_waiting or not llm.report().scheduling.decode_steps:
            llm.engine.step()
        copies = Counter[int]()
        for _ in range(20):
            launches = _launches(llm.engine.step)
            copies[launches.pop("cudaMemcpy")] += 1
            assert launches == Counter({"cudaGraphLaunch": 1})
        assert copies == Counter({1: 20 - copies[2], 2: copies[2]})
        assert 3 <= copies[2] <= 4, "each of three rows reaches a new page once or twice"
        report = llm.report()
        assert report.counters.graphs == len(report.buckets) == 4
        assert {bucket.state for bucket in report.buckets} == {"graph"}
        assert not any(report.graph_events.values())


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="for Hopper and later",
)
def test_a_kernel_that_starts_early_waits_before_it_reads_or_writes() -> None:
    """All kernels of a decode step wait, so that none overtakes the last but one before it."""
    codes: list[str] = []
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 128, "max_model_len": 128}
    config = small_config(
        limits=limits, buckets={"decode": [4], "prefill": [128], "samplers": ["full"]}
    )
    with (
        fresh_cache(),
        mock.patch.object(GraphLowering, "save_output_code", codes.append),
        CompiledLLM(tiny_model("llama"), None, config, progress=False) as llm,
    ):
        assert [bucket.bucket for bucket in llm.report().buckets] == [
            "prefill-128-full",
            "decode-4-full",
        ]
    kernels = [
        re.findall(r"async_compile\.triton\('\w+', \'\'\'(.*?)\'\'\'", code, re.DOTALL)
        for code in codes
    ]
    usual, early = sorted(kernels, key=lambda of_bucket: "launch_pdl': True" in of_bucket[0])
    assert not any("gdc_wait" in kernel for kernel in usual)
    assert len(early) > 5
    for kernel in early:
        assert "'launch_pdl': True" in kernel
        body = kernel[kernel.index("\ndef triton_") :]
        for branch in re.split(r"\n    (?:el)?if pid", body)[
            body.count("\n    if pid") :
        ]:  # of kernels that are one launch
            assert (
                0
                < branch.index("gdc_wait()")
                < re.search(r"tl\.(load|store|atomic_add)\(", branch).start()
            )


def test_the_host_runs_ahead_of_the_device() -> None:
    """A step is planned and launched while the one before it runs, without waiting for tokens."""
    with CompiledLLM(tiny_model("llama"), None, small_config(), progress=False) as llm:
        _add(llm, [20, 7, 33])
        while llm.engine.num_waiting or not llm.report().scheduling.decode_steps:
            llm.engine.step()
        before = llm.report().scheduling.steps
        torch.cuda._sleep(200_000_000)  # about 0.1 s on the device
        began = time.perf_counter()
        plan = llm.engine._core.schedule()
        llm.engine._core.launch(plan)
        assert time.perf_counter() - began < 0.03
        assert llm.report().scheduling.steps == before + 1


@pytest.mark.parametrize("dispatch", ["direct", "torch"])
def test_replay_equals_eager_as_lengths_tables_and_batches_change(dispatch: str) -> None:
    batches = [[5], [16, 1], [15, 17, 16], [31, 32, 33, 1], [60, 3]]
    prompts = [
        [prompt_of(length, seed) for length in lengths] for seed, lengths in enumerate(batches)
    ]
    model = tiny_model("qwen3")
    reference = Reference(model)
    tokens = {}
    for mode in (dispatch, "eager"):
        with CompiledLLM(
            model, None, small_config(compile={"dispatch": mode}), progress=False
        ) as llm:
            before, tokens[mode] = graph_events(model.device), []
            for batch in prompts:
                poison(llm)
                tokens[mode].append(greedy(llm, batch, 20))
            report = llm.report()
            assert graph_events(model.device) == before
            assert not any(report.graph_events.values())
            assert bool(report.fallbacks) == (mode == "eager")
    torch.compiler.reset()  # Dynamo keeps compiled code until it compiles the same code again
    assert tokens[dispatch] == tokens["eager"]
    assert tokens[dispatch] == [[reference(prompt, 20) for prompt in batch] for batch in prompts]


@torch.library.custom_op("compiled_llm_tests::wait", mutates_args=())
def wait(x: torch.Tensor) -> torch.Tensor:
    """Wait for the device, which makes a capture fail."""
    x.sum().item()
    return x.clone()


@wait.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_a_failed_capture_leaves_the_other_graphs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later graphs of its own engine, and earlier ones of another engine, still work."""
    model = tiny_model("llama")
    reference = Reference(model)
    prompt = prompt_of(12)
    with CompiledLLM(model, None, small_config(), progress=False) as before:
        assert greedy(before, [prompt], 20) == [reference(prompt, 20)]
        _check_failed_captures(model, reference, monkeypatch)
        assert greedy(before, [prompt], 20) == [reference(prompt, 20)]
        assert not before.report().fallbacks


def _check_failed_captures(
    model: PreTrainedModel, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = step.sample_greedy

    def failing(logits: torch.Tensor) -> torch.Tensor:
        return sample(wait(logits) if logits.shape[0] == 4 else logits)

    monkeypatch.setattr(step, "sample_greedy", failing)
    # The decode buckets are 4 (which fails), 2 and 1. Of the prefill buckets, 8 fails too, since it
    # has 4 sequences. Prompts of more than 3 tokens are prefilled eagerly, with as many tokens per
    # step as the limit allows, so only the last batch fits the other prefill bucket.
    config = small_config(
        limits={"max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 128},
        buckets={"decode": [1, 2], "prefill": [3]},
    )
    with CompiledLLM(model, None, config, progress=False) as llm:
        for lengths in ([5, 9, 30], [12], [6, 7], [3, 3, 3, 3], [2]):
            prompts = [prompt_of(length) for length in lengths]
            assert greedy(llm, prompts, 20) == [reference(prompt, 20) for prompt in prompts]
        report = llm.report()
    states = {bucket.bucket: bucket.state for bucket in report.buckets}
    failures = [bucket.failure for bucket in report.buckets]
    assert states == {
        "prefill-3-greedy": "graph",
        "prefill-8-greedy": "failed",
        "decode-1-greedy": "graph",
        "decode-2-greedy": "graph",
        "decode-4-greedy": "failed",
    }, failures
    assert sorted(reason[: reason.index(" failed: ")] for reason in report.fallbacks) == [
        "decode-4-greedy",
        "prefill-8-greedy",
    ]
    assert [
        bucket.bucket for bucket in report.buckets if bucket.state == "graph" and not bucket.replays
    ] == []


def test_closing_releases_the_memory() -> None:
    model = tiny_model("llama")
    reserved = []
    for _ in range(3):
        with CompiledLLM(model, None, small_config(), progress=False) as llm:
            greedy(llm, [prompt_of(5)], 4)
            assert graph_pool(model.device)[0] == 4
        assert graph_pool(model.device) == (0, 0)
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[0] == reserved[1] == reserved[2]
