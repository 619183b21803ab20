"""Tests of attention routing: the last engine of a model restores what engines have changed."""

import copy
from contextlib import ExitStack
from itertools import permutations
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from compiled_llm.models.attention import ATTENTION_NAME
from compiled_llm.models.attention_routing import attention_routed
from tests.helpers.tiny_models import tiny_model
from tests.model_sweep.tiny_configs import tiny_config
from tests.model_sweep.tiny_model import tiny_model as random_model


def _state(model: PreTrainedModel) -> list[object]:
    attention, experts = model.config._attn_implementation, model.get_experts_implementation()
    return [
        attention,
        experts,
        *(m.training for m in model.modules()),
        *(p.requires_grad for p in model.parameters()),
    ]


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_the_last_engine_restores_the_original_values(order: tuple[int, ...]) -> None:
    model = tiny_model("gpt_oss").train()
    model.model.layers[0].eval()
    model.model.embed_tokens.requires_grad_(False)
    before, stacks = _state(model), [ExitStack() for _ in order]
    for stack in stacks:
        stack.enter_context(attention_routed(model))
    for number in order:
        assert model.config._attn_implementation == ATTENTION_NAME
        assert not any(parameter.requires_grad for parameter in model.parameters())
        stacks[number].close()
    assert _state(model) == before
    with attention_routed(model):
        assert model.config._attn_implementation == ATTENTION_NAME
    assert _state(model) == before


def test_models_that_share_a_config_and_modules() -> None:
    one = tiny_model("llama")
    other = type(one)(one.config)
    other.model = one.model
    before, mine, theirs = _state(one), ExitStack(), ExitStack()
    mine.enter_context(attention_routed(one))
    theirs.enter_context(attention_routed(other))
    mine.close()
    assert one.config._attn_implementation == ATTENTION_NAME
    assert not one.model.embed_tokens.weight.requires_grad
    theirs.close()
    assert _state(one) == before


def test_sub_configs_keep_their_own_implementations() -> None:
    model = random_model(tiny_config("gemma3"))
    model.set_attn_implementation({"": "eager", "text_config": "sdpa", "vision_config": "eager"})
    parts = [model.config, model.config.text_config, model.config.vision_config]
    before = [part._attn_implementation for part in parts]
    assert len(set(before)) == 2
    with attention_routed(model):
        assert model.config.text_config._attn_implementation == ATTENTION_NAME
    assert [part._attn_implementation for part in parts] == before


def test_changes_by_the_user_are_kept() -> None:
    model = tiny_model("llama")
    layer = model.model.layers[0]
    with attention_routed(model):
        model.set_attn_implementation("eager")
        layer.mlp.gate_proj.weight = torch.nn.Parameter(torch.zeros(96, 64), requires_grad=False)
        model.lm_head.weight.requires_grad_(True)
        layer.train()
    assert model.config._attn_implementation == "eager"
    assert layer.training
    assert not model.training
    assert not layer.mlp.gate_proj.weight.requires_grad
    assert model.lm_head.weight.requires_grad
    assert layer.mlp.up_proj.weight.requires_grad


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_model_unchanged(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama").train()
    before = _state(model)

    def fail(*_: Any) -> None:
        raise error

    for name in ("set_experts_implementation", "requires_grad_"):
        with monkeypatch.context() as patch:
            patch.setattr(type(model), name, fail)
            with pytest.raises(error), attention_routed(model):
                pass
        assert _state(model) == before


def test_a_copy_of_a_routed_model_is_independent() -> None:
    model = tiny_model("llama")
    with attention_routed(model):
        copied = copy.deepcopy(model)
    assert model.config._attn_implementation != ATTENTION_NAME
    copied.set_attn_implementation("eager")
    with attention_routed(copied):
        assert model.config._attn_implementation != ATTENTION_NAME
