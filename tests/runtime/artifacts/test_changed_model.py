"""Artifacts of a model whose code differs are not used."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn
from torch._inductor.utils import fresh_cache
from transformers import PreTrainedModel

from compiled_llm import CompiledLLM
from compiled_llm.report.report import Report
from compiled_llm.runtime.capture import warmup
from compiled_llm.runtime.compilation.compiler import DISPATCHES, CompiledStep
from compiled_llm.runtime.compilation.timing import Timestamp, durations
from compiled_llm.runtime.step.step import Step
from passes import Pipeline
from tests.helpers.tiny_models import Reference, greedy, small_config, tiny_model
from tests.runtime.artifacts.engines import PROMPTS


def _start(
    artifact: Path, change: Callable[[PreTrainedModel], None] | None, **buckets: object
) -> tuple[Report, bool]:
    """Start on a changed model of the caller; return the report and whether tokens are right."""
    model = tiny_model("llama")
    if change is not None:
        change(model)
    right = [Reference(model)(prompt, 10) for prompt in PROMPTS]
    config = small_config(
        compile={"artifact": str(artifact)}, buckets={"decode": [], "prefill": [48], **buckets}
    )
    with fresh_cache(), CompiledLLM(model, None, config, progress=False) as llm:
        return llm.report(), greedy(llm, PROMPTS, 10) == right


def _negate_steps_of_48(model: PreTrainedModel) -> None:
    """Change steps of 48 tokens, but not the step that the key identifies."""
    model.model.norm.register_forward_hook(
        lambda module, inputs, output: -output if output.shape[1] == 48 else output
    )


def _use_gelu(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()


def test_an_artifact_of_another_model_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The models have the same config, classes and weights, but another activation."""
    monkeypatch.setenv("COMPILED_LLM_CACHE", str(tmp_path / "cache"))
    report, right = _start(tmp_path / "a", None)
    assert (right, report.warnings) == (True, [])

    report, right = _start(tmp_path / "a", _use_gelu, prefill=[])
    assert re.search("code: graph [0-9a-f]{16}; here: graph [0-9a-f]{16}", caplog.text)
    assert right
    assert "code: graph" in str(report.startup.artifact_refusal)

    report, right = _start(tmp_path / "a", None)
    assert [bucket.loaded for bucket in report.buckets] == [True]
    assert right

    report, right = _start(tmp_path / "a", _negate_steps_of_48)
    assert [bucket.loaded for bucket in report.buckets] == [False]
    assert not right, "the hook ran in the engine, and not in the reference's steps of other sizes"
    (warning,) = report.warnings
    assert "prefill-48-greedy" in warning
    assert "was compiled from another graph" in warning


@pytest.mark.parametrize("changed", [False, True])
def test_a_loaded_model_that_is_changed_is_not_saved(
    changed: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact is that of the checkpoint's source."""

    def uncompiled(step: Step, pipeline: Pipeline, options: dict[str, object]) -> CompiledStep:
        now = Timestamp.now()
        return CompiledStep(
            launch=step,
            graph=False,
            recording=None,
            function=None,
            seconds=durations(now, now, now),
        )

    monkeypatch.setitem(DISPATCHES, "direct", uncompiled)
    monkeypatch.setattr(warmup, "serialize", lambda compiled: b"compiled")
    model = {"name": str(checkpoint), "dtype": "float32"}
    lazy = {"artifact": str(tmp_path / "a"), "capture": "lazy"}
    config = small_config(compile=lazy, model=model, buckets={"decode": [], "prefill": [48]})
    with CompiledLLM.from_pretrained(config=config, progress=False) as llm:
        if changed:
            _use_gelu(llm.model)
            with pytest.raises(RuntimeError, match="was replaced while an engine uses it"):
                greedy(llm, PROMPTS, 2)
        else:
            greedy(llm, PROMPTS, 2)
        assert [bucket.state for bucket in llm.report().buckets] == [
            "pending" if changed else "compiled"
        ]
    assert len(list((tmp_path / "a").glob("*.bucket"))) == (0 if changed else 1)
