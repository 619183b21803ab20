"""Milliseconds of a decode step over a sweep of batch sizes, beside transformers' own eager decode in the same process.

    python bench/latency.py --config configs/qwen3-0.6b-gpu.yaml --set model.weights=random

Prints the start-up phases, a table, and one JSON object as the last line. A step is the engine's: planned, launched, and the
tokens of the one before it read. The wall time of `steps` steps is divided by their number; the figure is the median of
`rounds`; host time is what the calling thread spends on a step besides waiting for the device.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from compiled_llm import CompiledLLM, SamplingParams, load_config
from compiled_llm.engine.request import Request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="A.B=C")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=128, help="prompt tokens of each sequence")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    options = parser.parse_args()

    began = time.perf_counter()
    rows = []
    with CompiledLLM.from_pretrained(config=load_config(options.config, options.overrides)) as llm:
        ready = time.perf_counter() - began
        print(llm.report())
        for batch in options.batch:
            rows.append(_ours(llm, batch, options.context, options.steps, options.rounds))
        report = llm.report()
        model = llm.model
    for row in [] if options.no_peer else rows:
        row["transformers_ms"] = _transformers(model, row["batch"], options.context, options.rounds)
    _print(rows)
    result = {
        "model": type(model).__name__,
        "parameters": model.num_parameters(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "context": options.context,
        "ready_s": round(ready, 2),
        "phases": {phase.name: round(phase.seconds, 2) for phase in report.phases},
        "graphs": report.graphs,
        "pool_bytes": report.pool_bytes,
        "fallbacks": dict(report.fallbacks),
        "graph_events": report.graph_events,
        "rows": rows,
    }
    print(json.dumps(result))


def _ours(llm: CompiledLLM, batch: int, context: int, steps: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of a decode step, microseconds of host time in it, and milliseconds to the first token of one prompt."""
    params = SamplingParams(temperature=0.0, max_tokens=1 + steps * (rounds + 1), ignore_eos=True)
    first_token = []
    for row in range(batch):
        begin = time.perf_counter()
        llm.generate([7 + row] * context, replace(params, max_tokens=1), progress=False)
        first_token.append((time.perf_counter() - begin) * 1e3)
    llm.reset_prefix_cache()
    stats, seconds, host = llm.report().scheduling, [], []
    requests = [
        Request(prompt_token_ids=[7 + row] * context, params=params, max_tokens=params.max_tokens or 1) for row in range(batch)
    ]
    for request in requests:
        llm.engine.add(request)
    while llm.engine.num_waiting or not stats.decode_steps:
        llm.engine.step()
    for _ in range(rounds):
        _wait()
        begin, hosted = time.perf_counter(), stats.host_seconds
        for _ in range(steps):
            llm.engine.step()
        _wait()
        seconds.append((time.perf_counter() - begin) / steps)
        host.append((stats.host_seconds - hosted) / steps)
    for request in requests:
        llm.engine.abort(request)
    while llm.engine.has_work:
        llm.engine.step()
    return {
        "batch": batch,
        "step_ms": round(statistics.median(seconds) * 1e3, 4),
        "host_us": round(statistics.median(host) * 1e6, 2),
        "first_token_ms": round(statistics.median(first_token), 3),
    }


def _transformers(model: PreTrainedModel, batch: int, context: int, rounds: int) -> float:
    """Median milliseconds of a decode step of the same model, eager, with sdpa attention and transformers' own cache."""
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        output = model(torch.full((batch, context), 7, device=model.device), use_cache=True)
        token = torch.full((batch, 1), 7, device=model.device)

        def step() -> None:
            model(token, past_key_values=output.past_key_values, use_cache=True)

        return round(_median_seconds(step, steps=10, rounds=rounds) * 1e3, 4)


def _median_seconds(step: Callable[[], None], *, steps: int, rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        _wait()
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        _wait()
        times.append((time.perf_counter() - begin) / steps)
    return statistics.median(times[1:])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _print(rows: list[dict[str, float]]) -> None:
    names = list(rows[0])
    print("  ".join(f"{name:>16}" for name in names))
    for row in rows:
        print("  ".join(f"{row[name]:>16}" for name in names))


if __name__ == "__main__":
    main()
