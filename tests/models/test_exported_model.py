"""Tests of models that compute attention themselves: it is recognised or refused."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compiled_llm import CompiledLLM
from compiled_llm.errors import NeedsWeightsError, UnsupportedModelError
from compiled_llm.models import exported_model
from compiled_llm.models.attention_routing import attention_routed
from compiled_llm.models.discovery import AttentionLayer, examine_model
from compiled_llm.models.exported_model import ExportedModel
from compiled_llm.models.token_independence import check_token_independence
from compiled_llm.models.weight_packing import linears_by_input
from passes.attention_reach import FULL
from passes.export.score_mod import ScoreMod
from tests.conftest import DEVICE
from tests.model_sweep.check import (
    Reference,
    engine_config,
    generate,
    random_prompt,
    relative_difference,
)
from tests.model_sweep.tiny_configs import tiny_config
from tests.model_sweep.tiny_model import tiny_model

# Config values, and the expected window of each layer, key heads, and slopes of the first heads.
KINDS: dict[str, tuple[dict[str, Any], list[int], int, list[float]]] = {
    "bloom": ({"n_head": 4}, [0, 0], 4, [0.25, 0.0625]),
    "mpt": ({"n_heads": 4, "d_model": 64, "n_layers": 2}, [0, 0], 4, [0.25, 0.0625]),
    "gptj": ({"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8}, [0, 0], 4, []),
    "falcon": ({}, [0, 0], 1, []),
    "falcon, heads repeated": (
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        [0, 0],
        2,
        [],
    ),
    "gpt_neo": (
        {
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 500,
        },
        [0, 500],
        4,
        [],
    ),
}


def _model(
    kind: str, implementation: str = "eager", dtype: torch.dtype = torch.float32, **values: Any
) -> PreTrainedModel:
    common = {
        "vocab_size": 160,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = AutoConfig.for_model(kind, **{**common, **values})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=implementation
    )
    return model.eval().to(DEVICE)


def _examined(model: PreTrainedModel) -> tuple[ExportedModel, list[AttentionLayer]]:
    with attention_routed(model):
        served, layers = examine_model(model)
        check_token_independence(served, 128)
    assert isinstance(served, ExportedModel)
    return served, layers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_is_recognised(kind: str, dtype: torch.dtype) -> None:
    values, windows, kv_heads, slopes = KINDS[kind]
    served, layers = _examined(_model(kind.split(",")[0], dtype=dtype, **values))
    assert [layer.reach.encode() for layer in layers] == windows
    assert {(layer.num_kv_heads, layer.key_dim, layer.dtype) for layer in layers} == {
        (kv_heads, 16, dtype)
    }
    assert {tensor.device for tensor in [*served.buffers(), *served.parameters()]} == {
        served.device
    }
    found = [
        buffer[:2].tolist() for name, buffer in served.named_buffers() if name.endswith("slopes")
    ]
    assert found == ([slopes] * 2 if slopes else [])


def test_parameters_are_the_models_own() -> None:
    """Otherwise weights would be in memory twice, and could not be packed."""
    model = _model("gptj", n_embd=64, n_head=4, n_layer=2, rotary_dim=8)
    with linears_by_input(model) as groups:
        served, _ = _examined(model)
    assert {id(p) for p in served.parameters()} == {id(p) for p in model.parameters()}
    assert [len(group) for group in groups] == [3, 3]


def test_slopes_are_on_the_models_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scores are evaluated on the CPU, but slopes are read on the queries' device."""
    made = []

    def replace(
        module: GraphModule, make: Callable[[ScoreMod], nn.Module], num_tokens: int
    ) -> list[str]:
        made.append(make(ScoreMod(scale=1.0, reach=FULL, slopes=torch.ones(4))))
        return ["attention"]

    monkeypatch.setattr(exported_model, "replace_attention_subgraphs", replace)
    with pytest.raises(NeedsWeightsError):
        exported_model.export_model(_model("bloom", n_head=4).to("meta"))
    assert [buffer.device.type for attend in made for buffer in attend.buffers()] == ["meta"]


def test_an_exported_model_can_be_pickled() -> None:
    served, _ = _examined(_model("bloom", n_head=4))
    sent = pickle.loads(pickle.dumps(served))
    here, there = (
        [str(n.target) for n in m.forward_graph.graph.nodes if n.op.startswith("call")]
        for m in (served, sent)
    )
    assert here == there
    assert len(list(sent.buffers())) == len(list(served.buffers()))


def test_scaled_dot_product_attention_is_recognised() -> None:
    """Some models call torch's function themselves, if created with `sdpa`."""
    for values, kv_heads in ({}, 1), ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2):
        layers = _examined(_model("falcon", "sdpa", **values))[1]
        assert [layer.num_kv_heads for layer in layers] == [kv_heads] * 2


@pytest.mark.parametrize(("kind", "tolerance"), [("gptj", 1e-4), ("mpt", 1e-4)])
def test_an_engine_matches_the_models_own_generation(kind: str, tolerance: float) -> None:
    model = tiny_model(tiny_config(kind))
    reference, prompts = Reference(model), [random_prompt(length) for length in (3, 41, 24)]
    with CompiledLLM(model.to(DEVICE), None, engine_config("direct"), progress=False) as llm:
        outputs = generate(llm, prompts)
        assert not llm.report().fallbacks
    for prompt, (tokens, logits) in zip(prompts, outputs, strict=True):
        expected, expected_logits = reference(prompt)
        assert tokens == expected
        assert relative_difference(logits.cpu(), expected_logits) <= tolerance


def test_a_bias_in_low_precision_is_refused_for_float32_logits() -> None:
    """Falcon computes its ALiBi bias in bfloat16, which no slopes reproduce in float32."""
    _examined(_model("falcon", dtype=torch.bfloat16, alibi=True))
    with pytest.raises(UnsupportedModelError, match="bias to scores that is not linear"):
        _examined(_model("falcon", alibi=True))
