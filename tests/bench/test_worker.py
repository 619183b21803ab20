"""Systems in processes of their own: what they print, how they fail, and that a failure stays theirs."""

import time
from pathlib import Path

import pytest

from bench import latency, throughput
from bench.systems import SYSTEMS, Setup
from bench.worker_client import WorkerClient, WorkerError
from bench.worker_group import Options, WorkerGroup
from bench.workloads import offline
from tests.bench.local import made_up_card, write_architecture

_SETUP = Setup(
    config={},
    dtype="float32",
    device="cpu",
    max_num_seqs=4,
    max_num_batched_tokens=64,
    max_model_len=128,
)


def _session(monkeypatch: pytest.MonkeyPatch, **classes: str) -> WorkerGroup:
    session = WorkerGroup()
    for name, found in classes.items():
        monkeypatch.setitem(SYSTEMS, name, f"tests.bench.fakes:{found}")
        session.start(name, _SETUP, Options())
    return session


def test_what_a_worker_prints_does_not_reach_its_answers() -> None:
    with WorkerClient("tests.bench.fakes:Fake", {}) as worker:
        assert worker.call("start") == 1.5
        assert "beneath Python" in worker.log.read_text()


def test_an_error_is_an_answer_and_a_death_has_a_reason() -> None:
    with WorkerClient("tests.bench.fakes:Crashing", {}) as worker:
        with pytest.raises(WorkerError, match=r"ValueError: it cannot$") as failed:
            worker.call("fail")
        assert failed.value.alive
        assert worker.call("describe") == {"version": "1"}
        with pytest.raises(WorkerError, match="ended with code 3: a last word") as died:
            worker.call("generate", prompts=[[1], [2]], output_lengths=[1, 1], temperature=0.0)
        assert not died.value.alive


def test_a_call_that_takes_too_long_is_ended() -> None:
    began = time.perf_counter()
    with (
        WorkerClient("tests.bench.fakes:Fake", {}, limit=1.0) as worker,
        pytest.raises(WorkerError, match="longer than --limit 1 s"),
    ):
        worker.call("sleep", seconds=60)
    assert time.perf_counter() - began < 10


def test_closing_lets_the_object_go_first() -> None:
    worker = WorkerClient("tests.bench.fakes:Fake", {})
    worker.close()
    assert "let go" in worker.log.read_text()
    worker.close()


def test_an_unknown_target_is_an_error() -> None:
    with pytest.raises(WorkerError, match="no attribute 'Nothing'"):
        WorkerClient("tests.bench.fakes:Nothing", {})


def test_vllm_without_vllm_is_left_out_with_a_sentence() -> None:
    with pytest.raises(
        WorkerError, match="vllm is not importable here: install it, or pass --vllm-pythonpath DIR"
    ):
        WorkerClient(SYSTEMS["vllm"], {**_fields(), "config": {}})


_VLLM = """
import sys
__version__ = "0.0"
class SamplingParams:
    def __init__(self, **values): self.values = values
class _Output:
    def __init__(self, n): self.token_ids = [7] * n; self.outputs = [self]
class LLM:
    def __init__(self, model, **options):
        assert not {"compiled_llm", "torch", "pydantic"} & sys.modules.keys(), "vLLM's environment may have none of these"
        with open(model + "/config.json") as file: assert "llama" in file.read()
        assert options["load_format"] == "dummy" and options["gpu_memory_utilization"] == 0.25, options
    def generate(self, prompts, params, use_tqdm):
        assert all(prompt["prompt_token_ids"] for prompt in prompts)
        return [_Output(each.values["max_tokens"]) for each in params]
"""


def test_vllm_is_found_in_a_path_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text(_VLLM)
    model = {"name": str(write_architecture(tmp_path)), "weights": "random"}
    arguments = {**_fields(), "config": {"model": model}, "memory_share": 0.25}
    with WorkerClient(SYSTEMS["vllm"], arguments, pythonpath=str(tmp_path)) as worker:
        assert worker.call("start") > 0
        assert worker.call(
            "generate", prompts=[[1], [2, 3]], output_lengths=[4, 5], temperature=0.6
        )["counts"] == [4, 5]
        assert worker.call("describe") == {"version": "0.0"}
        worker.call("close")


def test_one_system_s_crash_leaves_the_others_their_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = _session(
        monkeypatch, fake="Fake", crashing="Crashing", unstartable="Unstartable", short="Short"
    )
    plan = latency.Plan(batches=[1, 2, 8], context=8, steps=5, rounds=3)
    try:
        cells = latency.run(
            session, ["fake", "crashing", "unstartable", "short"], plan, made_up_card()
        )
    finally:
        session.close()
    rows = {
        (row["system"], row["batch"]): row for row in latency.table(cells, plan, made_up_card())
    }
    assert rows["fake", 2]["step_ms"] == pytest.approx(2.0)
    assert rows["fake", 2]["first_token_ms"] == pytest.approx(22.0)
    assert rows["fake", 2]["tokens_per_second"] == pytest.approx(1000)
    assert rows["fake", 2]["least_ms"] == pytest.approx((4000 + 2 * 8 * 16) / 1e6 * 1e3)
    assert rows["crashing", 1]["step_ratio"] == pytest.approx(1.0)
    assert "a last word" in rows["crashing", 2]["failure"]
    assert rows["unstartable", 1]["failure"] == "RuntimeError: no device"
    assert "tokens came" in rows["short", 1]["failure"]
    assert rows["fake", 8]["failure"] == "limits.max_num_seqs is 4"


def test_throughput_takes_medians_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    session = _session(monkeypatch, fake="Fake", unstartable="Unstartable")
    workload = offline(4, prompt_lengths=(2, 5), output_lengths=(3, 9), vocab_size=160)
    try:
        runs = throughput.run(session, ["fake", "unstartable"], workload, rounds=2)
        rows = throughput.table(session, runs, workload)
    finally:
        session.close()
    assert len(runs[0].rounds) == 2
    assert rows[0]["seconds"] == pytest.approx(0.04 + 0.002 * max(workload.output_lengths))
    assert rows[0]["ratio"] == pytest.approx(1)
    assert rows[1]["failure"] == "RuntimeError: no device"


def _fields() -> dict[str, object]:
    return {
        "dtype": "float32",
        "device": "cpu",
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "max_model_len": 128,
    }
