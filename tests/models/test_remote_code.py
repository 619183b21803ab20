"""Tests of code that comes with a checkpoint."""

import json
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from compiled_llm.config.schema import ModelConfig
from compiled_llm.errors import UnsupportedModelError
from compiled_llm.models.loading import load
from compiled_llm.models.preflight import code_arguments
from tests.helpers.tiny_models import tiny_model


def test_code_is_loaded_from_the_commit_of_the_config() -> None:
    """transformers uses the newest code for a model created from a config, and keeps using it."""

    class OwnConfig(LlamaConfig):
        model_type = "own"

    config = OwnConfig(name_or_path="owner/model")
    config._commit_hash, config.auto_map = (
        "abc123",
        {"AutoModelForCausalLM": "owner/model--own.OwnModel"},
    )
    assert code_arguments(config, False) == {"trust_remote_code": False}
    assert code_arguments(config, True) == {"trust_remote_code": True, "code_revision": "abc123"}
    config.auto_map = {"AutoModelForCausalLM": "someone/else--own.OwnModel"}
    assert code_arguments(config, True) == {"trust_remote_code": True}, (
        "the commit is of another repository"
    )


_OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_runs_only_with_trust_remote_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "own.py").write_text(_OWN_CODE)
    file = tmp_path / "model" / "config.json"
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "model_type": "own", "auto_map": names})
    )
    with pytest.raises(UnsupportedModelError, match=r"only with model.trust_remote_code=true"):
        load(ModelConfig(name=str(tmp_path / "model")))
    loaded = load(ModelConfig(name=str(tmp_path / "model"), trust_remote_code=True))
    assert type(loaded.model).__name__ == "OwnModel"
