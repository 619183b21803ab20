"""Output tokens per second of an offline workload (see bench/workloads.py), and where the time goes.

    python bench/throughput.py --config configs/qwen3-0.6b-throughput.yaml

Prints a card and one JSON object as the last line. The figure is the median of `rounds` calls of `generate` with all prompts at
once. With --profile some steps more are recorded, to tell how long the GPU idles between them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from workloads import Workload, offline

from compiled_llm import CompiledLLM, SamplingParams, load_config
from compiled_llm.engine.request import Request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="A.B=C")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--longest", type=int, default=1024, help="tokens of the longest prompt and output")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS")
    options = parser.parse_args()

    workload = offline(options.prompts, longest=options.longest)
    began = time.perf_counter()
    with CompiledLLM.from_pretrained(config=load_config(options.config, options.overrides)) as llm:
        ready = time.perf_counter() - began
        before = _counts(llm)
        seconds = [_run(llm, workload) for _ in range(options.rounds)]
        after = _counts(llm)
        idle = _idle_share(llm, workload, options.profile) if options.profile else None
        print(llm.report())
        result = {
            "model": type(llm.model).__name__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "torch": torch.__version__,
            "output_tokens": workload.num_output_tokens,
            "seconds": [round(s, 3) for s in seconds],
            "tokens_per_second": round(workload.num_output_tokens / statistics.median(seconds), 1),
            "ready_s": round(ready, 1),
            **_rates(before, after),
            "idle_between_steps": idle,
            "fallbacks": dict(llm.report().fallbacks),
            "graph_events": llm.report().graph_events,
        }
    print(json.dumps(result))


def _run(llm: CompiledLLM, workload: Workload) -> float:
    params = [SamplingParams(temperature=workload.temperature, max_tokens=n, ignore_eos=True) for n in workload.output_lengths]
    llm.reset_prefix_cache()
    began = time.perf_counter()
    outputs = llm.generate(workload.prompts, params, progress=False)
    seconds = time.perf_counter() - began
    assert sum(len(output.outputs[0].token_ids) for output in outputs) == workload.num_output_tokens
    return seconds


def _counts(llm: CompiledLLM) -> dict[str, float]:
    report = llm.report()
    stats = report.scheduling
    return {
        "steps": stats.steps,
        "host": stats.host_seconds,
        "padded": sum(bucket.padded for bucket in report.buckets),
        "computed": sum(bucket.replays * bucket.size for bucket in report.buckets),
        "preemptions": stats.preemptions,
    }


def _rates(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    grown = {name: after[name] - before[name] for name in after}
    return {
        "steps": grown["steps"],
        "host_us_per_step": round(grown["host"] / grown["steps"] * 1e6, 1),
        "padding_waste": round(grown["padded"] / max(1, grown["computed"]), 4),
        "preemptions": grown["preemptions"],
    }


def _idle_share(llm: CompiledLLM, workload: Workload, steps: int) -> dict[str, float]:
    """The share of time between two steps' kernels, over some steps that prefill and decode, and over as many that only decode."""
    llm.reset_prefix_cache()
    requests = [
        Request(prompt_token_ids=prompt, params=SamplingParams(temperature=workload.temperature, max_tokens=n), max_tokens=n)
        for prompt, n in zip(workload.prompts, workload.output_lengths, strict=True)
    ]
    for request in requests:
        llm.engine.add(request)
    for _ in range(10):
        llm.engine.step()
    shares = {"prefill": _profile(llm, min(steps, 30))}
    while llm.engine.num_waiting:
        llm.engine.step()
    for _ in range(20):
        llm.engine.step()
    shares["decode"] = _profile(llm, steps)
    for request in requests:
        llm.engine.abort(request)
    while llm.engine.has_work:
        llm.engine.step()
    return shares


def _profile(llm: CompiledLLM, steps: int) -> float:
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(steps):
            llm.engine.step()
        torch.cuda.synchronize()
    assert profiled.profiler is not None
    return _gaps(profiled.profiler.kineto_results.events())


def _gaps(events: Sequence[Any]) -> float:
    """The share of time in which nothing runs between one launch's last kernel and the next one's first."""
    launches: dict[int, tuple[int, int]] = {}
    for event in events:
        if event.device_type() == torch.autograd.DeviceType.CUDA and event.duration_ns():
            begin, end = event.start_ns(), event.start_ns() + event.duration_ns()
            first, last = launches.get(event.correlation_id(), (begin, end))
            launches[event.correlation_id()] = (min(first, begin), max(last, end))
    spans = sorted(launches.values())
    idle, reached = 0, spans[0][1]
    for begin, end in spans[1:]:
        idle += max(0, begin - reached)
        reached = max(reached, end)
    return round(idle / (reached - spans[0][0]), 4)


if __name__ == "__main__":
    main()
