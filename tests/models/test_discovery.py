"""What a model asks of attention is found, or refused by name."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compiled_llm import UnsupportedModelError
from compiled_llm.models.attention import attention_forward
from compiled_llm.models.discovery import attached, count_rotary_embeddings, discover
from tests.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found(family: str) -> None:
    model = tiny_model(family)
    before = model.config._attn_implementation
    with attached(model):
        layers = discover(model)
    assert model.config._attn_implementation == before
    assert len(layers) == 2
    assert len({layer.name for layer in layers}) == 2
    windows = {"gemma2": [24, 0], "gpt_oss": [24, 0], "phi3": [24, 24]}
    assert [layer.window for layer in layers] == windows.get(family, [0, 0])
    assert count_rotary_embeddings(model.config) == (0 if family == "gpt2" else 1)


def test_attaching_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama").train()
    with attached(model):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def _model(kind: str, **values: object) -> torch.nn.Module:
    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**common, **values})).eval()


REFUSED = {
    "bloom": ({"n_head": 4, "n_layer": 2}, "bloom: its forward takes no position_ids"),
    "gptj": ({"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4}, "gptj: its attention does not go through transformers'"),
    "lfm2": ({"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2}, "lfm2: layers of type conv are not supported"),
    "phimoe": (
        {"sliding_window": 8, "num_key_value_heads": 2, "num_local_experts": 2},
        r"phimoe: the sliding window of .* is only in its mask, which is not supported",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_served_is_named(kind: str) -> None:
    values, message = REFUSED[kind]
    model = _model(kind, **values)
    with pytest.raises(UnsupportedModelError, match=message), attached(model):
        discover(model)


def test_unknown_attention_arguments_are_refused_by_name() -> None:
    q = torch.zeros(1, 2, 1, 16)
    for arguments, message in [
        ({"attention_mask": torch.zeros(1)}, "explicit attention_mask"),
        ({"attention_mask": None, "dropout": 0.1}, "dropout of 0.1"),
        ({"attention_mask": None, "is_causal": False}, "is_causal=False"),
        ({"attention_mask": None, "position_bias": q}, "'position_bias' is not supported"),
    ]:
        with pytest.raises(UnsupportedModelError, match=message):
            attention_forward(torch.nn.Module(), q, q, q, **arguments)
    with pytest.raises(RuntimeError, match="belongs to a CompiledLLM"):
        attention_forward(torch.nn.Module(), q, q, q, None, position_ids=q, position_bias=None)
