"""Buckets compiled by other processes: the same tokens, and nothing compiled here; and whatever fails there is compiled here."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import nn
from torch._dynamo.utils import counters

from compiled_llm import CompiledLLM
from compiled_llm.runtime.compilation import weightless_pickle, worker_pool
from compiled_llm.runtime.compilation.worker_pool import num_processes
from tests.conftest import DEVICE
from tests.helpers.tiny_models import Reference, greedy, prompt_of, small_config, tiny_model

PROMPTS = [prompt_of(5), prompt_of(20)]
MODEL = tiny_model("llama")
LARGE = 2**17  # elements; more than travel whole


class Tied(nn.Module):
    """Parameters that are one, or lie side by side in one storage, and small ones that matter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(LARGE, device=DEVICE), requires_grad=False)
        self.same = self.weight
        together = torch.zeros(2, LARGE, device=DEVICE)
        self.first, self.second = (nn.Parameter(half, requires_grad=False) for half in together)
        self.register_buffer("scale", torch.arange(6.0, device=DEVICE).view(2, 3).T)


def test_a_module_travels_without_what_its_large_tensors_hold() -> None:
    model = Tied()
    content = weightless_pickle.dumps([model, model.weight])
    assert len(content) < 10_000
    there, weight = weightless_pickle.loads(content)
    assert there.weight is there.same
    assert there.weight is weight
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device) == (
        model.weight.shape,
        model.weight.dtype,
        model.weight.device,
    )
    assert there.first.untyped_storage().data_ptr() == there.second.untyped_storage().data_ptr()
    assert there.second.data_ptr() - there.first.data_ptr() == 4 * LARGE
    assert torch.equal(there.scale, model.scale)
    assert there.scale.stride() == model.scale.stride()


def pooled(directory: Path) -> Any:
    """A config for two processes, with four buckets."""
    return small_config(compile={"artifact": directory, "processes": 2})


def tokens_and_report(config: Any) -> tuple[list[list[int]], Any, int]:
    """What an engine generates, its report, and how many graphs this process traced for it."""
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
    assert traced == 1, "of one step, to identify the model"
    assert report.facts["compiled by"] == "2 processes"
    assert all(bucket.state != "failed" and not bucket.loaded for bucket in report.buckets)
    assert not report.fallbacks
    tokens, report, traced = tokens_and_report(config)
    assert (tokens, traced) == (expected, 1 + len(report.buckets))
    assert all(bucket.loaded for bucket in report.buckets), (
        "the other processes traced the same graphs"
    )
    assert "compiled by" not in report.facts


def test_a_compiler_that_is_set_up_otherwise_compiles_here(
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


def test_processes_that_end_are_not_waited_for(
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


def test_what_does_not_pickle_is_compiled_here(
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


def test_how_many_processes() -> None:
    cpu = torch.device("cpu")
    three = small_config(compile={"processes": 3})
    assert num_processes(three, cpu, 8) == 3
    assert num_processes(three, cpu, 2) == 2
    assert num_processes(three, cpu, 1) == 0
    assert num_processes(small_config(compile={"processes": 0}), cpu, 8) == 0
