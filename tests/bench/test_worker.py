"""Worker processes: their output, their failures, and the isolation of failures."""

import time
from pathlib import Path
from typing import Any

import pytest

from bench import latency, throughput
from bench.systems import SYSTEMS, Setup
from bench.worker_client import WorkerClient, WorkerError
from bench.worker_group import WorkerGroup, WorkerOptions
from bench.workloads import offline_workload
from tests.bench.local import fake_roofline, write_architecture

_LIMITS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "max_model_len": 128,
}


def _workers(monkeypatch: pytest.MonkeyPatch, **classes: str) -> WorkerGroup:
    workers = WorkerGroup()
    for name, class_name in classes.items():
        monkeypatch.setitem(SYSTEMS, name, f"tests.bench.fakes:{class_name}")
        workers.start(name, Setup(config={}, **_LIMITS), WorkerOptions())
    return workers


def test_output_of_a_worker_goes_to_its_log() -> None:
    with WorkerClient("tests.bench.fakes:Fake", {}) as worker:
        assert worker.call("start") == 1.5
        assert "written to the file descriptor" in worker.log.read_text()


def test_errors_and_exits_have_reasons() -> None:
    with WorkerClient("tests.bench.fakes:Crashing", {}) as worker:
        with pytest.raises(WorkerError, match=r"ValueError: first line$") as failed:
            worker.call("fail")
        assert failed.value.alive
        assert worker.call("describe") == {"version": "1"}
        with pytest.raises(WorkerError, match="ended with code 3: last line of the log") as died:
            worker.call("generate", prompts=[[1], [2]], output_lengths=[1, 1], temperature=0.0)
        assert not died.value.alive


def test_a_call_that_exceeds_its_timeout_is_killed() -> None:
    began = time.perf_counter()
    with (
        WorkerClient("tests.bench.fakes:Fake", {}, timeout=1.0) as worker,
        pytest.raises(WorkerError, match="longer than --limit 1 s"),
    ):
        worker.call("sleep", seconds=60)
    assert time.perf_counter() - began < 10


def test_close_closes_the_object_first() -> None:
    worker = WorkerClient("tests.bench.fakes:Fake", {})
    worker.close()
    assert "closed" in worker.log.read_text()
    worker.close()


def test_an_unknown_target_is_an_error() -> None:
    with pytest.raises(WorkerError, match="no attribute 'Nothing'"):
        WorkerClient("tests.bench.fakes:Nothing", {})


def test_missing_vllm_is_an_error_with_a_remedy() -> None:
    with pytest.raises(
        WorkerError, match="vllm cannot be imported: install it, or pass --vllm-pythonpath DIR"
    ):
        WorkerClient(SYSTEMS["vllm"], {**_LIMITS, "config": {}})


_VLLM = """
import sys
__version__ = "0.0"
class SamplingParams:
    def __init__(self, **values): self.values = values
class _Output:
    def __init__(self, n): self.token_ids = [7] * n; self.outputs = [self]
class LLM:
    def __init__(self, model, **options):
        imported = {"compiled_llm", "torch", "pydantic"} & sys.modules.keys()
        assert not imported, "the environment of vLLM may lack these"
        with open(model + "/config.json") as file: assert "llama" in file.read()
        assert options["load_format"] == "dummy", options
        assert options["gpu_memory_utilization"] == 0.25, options
    def generate(self, prompts, params, use_tqdm):
        assert all(prompt["prompt_token_ids"] for prompt in prompts)
        return [_Output(each.values["max_tokens"]) for each in params]
"""


def test_vllm_is_imported_from_its_own_path(tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text(_VLLM)
    model = {"name": str(write_architecture(tmp_path)), "weights": "random"}
    arguments = {**_LIMITS, "config": {"model": model}, "memory_share": 0.25}
    with WorkerClient(SYSTEMS["vllm"], arguments, pythonpath=str(tmp_path)) as worker:
        assert worker.call("start") > 0
        assert worker.call(
            "generate", prompts=[[1], [2, 3]], output_lengths=[4, 5], temperature=0.6
        )["counts"] == [4, 5]
        assert worker.call("describe") == {"version": "0.0"}
        worker.call("close")


def test_a_crash_leaves_the_results_of_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["fake", "crashing", "unstartable", "short"]
    classes = {name: name.title() for name in names}
    workers = _workers(monkeypatch, **classes)
    settings = latency.LatencySettings(batches=[1, 2, 8], context=8, steps=5, rounds=3)
    try:
        measurements = latency.measure(workers, names, settings, fake_roofline())
    finally:
        workers.close()
    table = latency.to_rows(measurements, settings, fake_roofline())
    rows = {(row["system"], row["batch"]): row for row in table}
    assert rows["fake", 2]["step_ms"] == pytest.approx(2.0)
    assert rows["fake", 2]["first_token_ms"] == pytest.approx(22.0)
    assert rows["fake", 2]["tokens_per_second"] == pytest.approx(1000)
    assert rows["fake", 2]["min_step_ms"] == pytest.approx((4000 + 2 * 8 * 16) / 1e6 * 1e3)
    assert rows["crashing", 1]["step_ratio"] == pytest.approx(1.0)
    assert "last line of the log" in rows["crashing", 2]["failure"]
    assert rows["unstartable", 1]["failure"] == "RuntimeError: no device"
    assert rows["short", 1]["failure"] == "expected 10 output tokens, got 9"
    assert rows["fake", 8]["failure"] == "limits.max_num_seqs is 4"


def test_throughput_takes_medians_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = _workers(monkeypatch, fake="Fake", unstartable="Unstartable")
    workload = offline_workload(4, prompt_lengths=(2, 5), output_lengths=(3, 9), vocab_size=160)
    try:
        results = throughput.measure(workers, ["fake", "unstartable"], workload, rounds=2)
        rows = throughput.to_rows(workers, results, workload)
    finally:
        workers.close()
    assert len(results[0].rounds) == 2
    assert rows[0]["seconds"] == pytest.approx(0.04 + 0.002 * max(workload.output_lengths))
    assert rows[0]["ratio"] == pytest.approx(1)
    assert rows[1]["failure"] == "RuntimeError: no device"
