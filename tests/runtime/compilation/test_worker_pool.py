"""Buckets compiled by other processes; the engine compiles those that fail there."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch._dynamo.utils import counters

from compiled_llm import CompiledLLM
from compiled_llm.runtime.compilation import weightless_pickle, worker_pool
from compiled_llm.runtime.compilation.worker_pool import num_processes
from tests.helpers.tiny_models import Reference, greedy, prompt_of, small_config, tiny_model

PROMPTS = [prompt_of(5), prompt_of(20)]
MODEL = tiny_model("llama")


def pooled(directory: Path) -> Any:
    """Return a config for two processes and four buckets."""
    return small_config(compile={"artifact": directory, "processes": 2})


def tokens_and_report(config: Any) -> tuple[list[list[int]], Any, int]:
    """Return an engine's tokens, its report and the number of graphs traced in this process."""
    before = counters["stats"]["unique_graphs"]
    with CompiledLLM(MODEL, config=config, progress=False) as llm:
        return greedy(llm, PROMPTS, 6), llm.report(), counters["stats"]["unique_graphs"] - before


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    reference = Reference(MODEL)
    return [reference(prompt, 6) for prompt in PROMPTS]


@pytest.mark.gpu
def test_two_processes_compile_and_the_engine_does_not(
    tmp_path: Path, expected: list[list[int]]
) -> None:
    config = pooled(tmp_path)
    tokens, report, traced = tokens_and_report(config)
    assert tokens == expected
    assert report.warnings == []
    assert traced == 1, "one step, to identify the model"
    assert report.facts["compiled by"] == "2 processes"
    assert all(bucket.state != "failed" and not bucket.loaded for bucket in report.buckets)
    assert not report.fallbacks
    tokens, report, traced = tokens_and_report(config)
    assert (tokens, traced) == (expected, 1 + len(report.buckets))
    assert all(bucket.loaded for bucket in report.buckets), (
        "the other processes traced the same graphs"
    )
    assert "compiled by" not in report.facts


def test_other_compiler_settings_are_compiled_by_the_engine(
    tmp_path: Path, expected: list[list[int]]
) -> None:
    with inductor_config.patch(max_fusion_size=3):
        tokens, report, traced = tokens_and_report(pooled(tmp_path))
    assert tokens == expected
    assert traced - 1 == len(report.buckets) == len(report.warnings)
    assert all(
        "torch._inductor.config.max_fusion_size: 3; here: 64" in warning
        for warning in report.warnings
    )


def test_the_engine_does_not_wait_for_dead_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]]
) -> None:
    start = subprocess.Popen
    dying = [sys.executable, "-c", "import sys; sys.exit('no memory')"]
    monkeypatch.setattr(
        worker_pool.subprocess, "Popen", lambda command, **kwargs: start(dying, **kwargs)
    )
    tokens, report, traced = tokens_and_report(pooled(tmp_path))
    assert tokens == expected
    assert traced - 1 == len(report.buckets) == len(report.warnings)
    assert all("ended too soon: no memory" in warning for warning in report.warnings)


def test_a_model_that_does_not_pickle_is_compiled_by_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]]
) -> None:
    monkeypatch.setattr(MODEL, "unpicklable", lambda: None, raising=False)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        weightless_pickle.dumps(MODEL)
    tokens, report, traced = tokens_and_report(pooled(tmp_path))
    assert tokens == expected
    assert traced == 1 + len(report.buckets)
    (warning,) = report.warnings
    assert "cannot be passed to other processes" in warning


def test_the_number_of_processes() -> None:
    cpu = torch.device("cpu")
    three = small_config(compile={"processes": 3})
    assert num_processes(three, cpu, 8) == 3
    assert num_processes(three, cpu, 2) == 2
    assert num_processes(three, cpu, 1) == 0
    assert num_processes(small_config(compile={"processes": 0}), cpu, 8) == 0
