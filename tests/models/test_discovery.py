"""Tests of the discovery of attention layers and of refused models."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compiled_llm.errors import UnsupportedModelError
from compiled_llm.models.attention import attention_forward
from compiled_llm.models.attention_routing import attention_routed
from compiled_llm.models.discovery import (
    count_rotary_embeddings,
    discover_attention_layers,
    examine_model,
)
from tests.helpers.tiny_models import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found(family: str) -> None:
    model = tiny_model(family)
    before = model.config._attn_implementation
    with attention_routed(model):
        layers = discover_attention_layers(model)
    assert model.config._attn_implementation == before
    assert len(layers) == 2
    assert len({layer.name for layer in layers}) == 2
    windows = {"gemma2": [24, 0], "gpt_oss": [24, 0], "phi3": [24, 24]}
    assert [layer.reach.encode() for layer in layers] == windows.get(family, [0, 0])
    assert count_rotary_embeddings(model) == (0 if family == "gpt2" else 1)


def test_routing_leaves_the_model_unchanged() -> None:
    model = tiny_model("llama").train()
    with attention_routed(model):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def _model(kind: str, **values: object) -> torch.nn.Module:
    common = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 32,
    }
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**common, **values})
    ).eval()


REFUSED = {
    "megatron-bert": (
        {"is_decoder": True},
        "megatron-bert: .* interface, and its mask is neither causal nor a causal window",
    ),
    "falcon": (
        {"alibi": True},
        "falcon: .* interface, and it adds a bias to scores that is not linear in",
    ),
    "xlnet": (
        {"d_model": 32, "n_head": 4, "n_layer": 2},
        "xlnet: .* interface, and none is recognised in its graph",
    ),
    "rwkv": (
        {"attention_hidden_size": 32},
        "rwkv: .* interface, and its graph depends on the number of tokens",
    ),
    "recurrent_gemma": (
        {"num_hidden_layers": 3, "lru_width": 32},
        "recurrent_gemma: it needs a cache of its own class",
    ),
    "deepseek_v32": (
        {},
        "deepseek_v32: layers of type deepseek_sparse_attention are not supported",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_unsupported_feature_is_named(kind: str) -> None:
    values, message = REFUSED[kind]
    model = _model(kind, **values)
    with pytest.raises(UnsupportedModelError, match=message), attention_routed(model):
        examine_model(model)


def test_windows_are_found_in_masks() -> None:
    """phimoe has its window in the mask alone, llama4 its chunks; layers of a model may differ."""
    values = {"num_key_value_heads": 2, "num_local_experts": 2, "head_dim": 8}
    kinds = {
        "layer_types": ["chunked_attention", "full_attention"],
        "attention_chunk_size": 16,
        "num_experts_per_tok": 1,
    }
    llama4 = {
        **values,
        **kinds,
        "intermediate_size_mlp": 32,
        "moe_layers": [1],
        "no_rope_layers": [1, 0],
    }
    for kind, changes, windows in [
        ("phimoe", {**values, "sliding_window": 8}, [8, 8]),
        ("llama4_text", llama4, [-16, 0]),
    ]:
        model = _model(kind, **changes)
        with attention_routed(model):
            assert [layer.reach.encode() for layer in discover_attention_layers(model)] == windows


def test_unknown_attention_arguments_are_refused_by_name() -> None:
    q = torch.zeros(1, 2, 1, 16)
    for arguments, message in [
        ({"attention_mask": torch.zeros(1)}, "explicit attention_mask"),
        ({"attention_mask": None, "dropout": 0.1}, "dropout of 0.1"),
        ({"attention_mask": None, "position_bias": q}, "'position_bias' is not supported"),
    ]:
        with pytest.raises(UnsupportedModelError, match=message):
            attention_forward(torch.nn.Module(), q, q, q, **arguments)
    with pytest.raises(RuntimeError, match="belongs to a CompiledLLM"):
        attention_forward(torch.nn.Module(), q, q, q, None, position_ids=q, position_bias=None)
