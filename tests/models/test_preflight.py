"""Tests of examining a model by its config: as with weights, or refused before they are read."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compiled_llm.cli.inspect import inspect_model
from compiled_llm.config.loader import parse_config
from compiled_llm.config.schema import ModelConfig
from compiled_llm.errors import NeedsWeightsError, UnsupportedModelError
from compiled_llm.models import loading
from compiled_llm.models.attention_routing import attention_routed
from compiled_llm.models.discovery import (
    count_rotary_embeddings,
    discover_attention_layers,
)
from compiled_llm.models.loading import load
from compiled_llm.models.preflight import check_supported, examine_config
from compiled_llm.models.state_discovery import discover_states
from compiled_llm.models.weight_packing import linears_by_input
from tests.conftest import DEVICE
from tests.helpers.tiny_models import tiny_model
from tests.model_sweep.tiny_configs import tiny_config
from tests.model_sweep.tiny_model import tiny_model as random_model


@pytest.mark.parametrize(
    "model_type",
    ["llama", "gemma2", "gpt_oss", "gpt2", "deepseek_v3", "gemma3n_text", "qwen3_next", "mamba"],
)
def test_a_config_gives_the_same_facts_as_its_model(model_type: str) -> None:
    config = tiny_config(model_type)
    found, model = examine_config(config, torch.float32), random_model(config).to(DEVICE)
    with attention_routed(model), linears_by_input(model) as groups:
        assert found.layers == tuple(discover_attention_layers(model))
    with attention_routed(model):
        assert found.states == tuple(discover_states(model))
    assert found.rotary_embeddings == count_rotary_embeddings(model)
    names = {module: name for name, module in model.named_modules()}
    assert found.merged_projections == tuple(
        tuple(names[module] for module in group) for group in groups
    )
    assert found.num_parameters == sum(parameter.numel() for parameter in model.parameters())


REFUSED = {
    "deepseek_v32": "layers of type deepseek_sparse_attention are not supported",
    "rwkv": "its attention does not go through transformers' attention interface, and its graph "
    "depends on the number",
    "inkling_text": "attention argument 'position_bias' is not supported",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_an_unsupported_model_is_refused_by_its_config(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match=REFUSED[model_type]):
        check_supported(tiny_config(model_type), torch.float32)


def test_a_model_that_depends_on_values_is_not_refused() -> None:
    """dbrx loops over the experts that tokens select."""
    with pytest.raises(
        NeedsWeightsError, match="dbrx: its forward depends on the values of tensors"
    ):
        examine_config(tiny_config("dbrx"), torch.float32)
    check_supported(tiny_config("dbrx"), torch.float32)
    for model_type in ("bloom", "falcon", "gpt_neo"):
        with pytest.raises(NeedsWeightsError, match=f"{model_type}: it computes attention itself"):
            examine_config(tiny_config(model_type), torch.float32)


def test_a_model_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rwkv = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("rwkv", hidden_size=32, num_hidden_layers=2, vocab_size=64)
    )
    rwkv.save_pretrained(tmp_path / "rwkv")
    tiny_model("llama").save_pretrained(tmp_path / "quantised")
    config = json.loads((tmp_path / "quantised" / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "awq", "bits": 4}}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(quantised))
    (tmp_path / "t5").mkdir()
    AutoConfig.for_model("t5").save_pretrained(tmp_path / "t5")
    (tmp_path / "t5" / "model.safetensors").touch()
    (tmp_path / "own").mkdir()
    own = {
        "model_type": "never_heard_of",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    (tmp_path / "own" / "config.json").write_text(json.dumps(own))
    (tmp_path / "own" / "model.safetensors").touch()
    (tmp_path / "own" / "own.py").write_text("raise SystemExit('code of the checkpoint ran')")

    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", read)
    for name, message in [
        ("rwkv", "rwkv: its attention does not go through"),
        ("quantised", "llama: weights quantised by awq are not supported"),
        ("t5", "t5: transformers has no causal LM of this type"),
        (
            "own",
            "needs code from its checkpoint, which runs only with model.trust_remote_code=true",
        ),
    ]:
        with pytest.raises(UnsupportedModelError, match=message):
            load(ModelConfig(name=str(tmp_path / name)))


def test_an_inspection_describes_the_engine(tmp_path: Path) -> None:
    model = tiny_model("gemma2")
    model.config.save_pretrained(tmp_path)
    settings = {
        "name": str(tmp_path / "config.json"),
        "weights": "random",
        "device": "cuda",
        "dtype": "bfloat16",
    }
    inspection = inspect_model(parse_config({"model": settings, "limits": {"max_model_len": 128}}))
    assert inspection.bytes_per_token == 2 * 2 * 32 * 2, (
        "keys and values of 2 heads of 32, in one of two layers"
    )
    assert inspection.bytes_of_windows == 24 * inspection.bytes_per_token
    assert inspection.expected["lower_attention_marker"] == 2
    assert inspection.expected["rotary_outer_product"] == 1
    assert inspection.expected["merge_projections"] == 4
    lines = dict(line.split(":", 1) for line in str(inspection).splitlines())
    assert (
        lines["attention"].split("; ")[0].strip()
        == "1 x window of 24, 4 heads, 2 of keys and values, dim 32"
    )
    assert "softcap" in lines["features"]
    assert "bfloat16 on cuda" in lines["model"]
    assert "states" not in lines
