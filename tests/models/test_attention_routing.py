"""What engines change on a model is restored by the last of them, however they come and go, and nothing else is."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import permutations
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from compiled_llm.models.attention import ATTENTION_NAME
from compiled_llm.models.attention_routing import attention_routed
from compiled_llm.models.attribute_overrides import AttributeOverrides
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


@pytest.mark.parametrize("order", permutations(range(3)), ids=str)
def test_the_last_to_go_restores_what_the_first_found(order: tuple[int, ...]) -> None:
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


def test_sub_configs_return_to_their_own_choices() -> None:
    model = random_model(tiny_config("gemma3"))
    model.set_attn_implementation({"": "eager", "text_config": "sdpa", "vision_config": "eager"})
    parts = [model.config, model.config.text_config, model.config.vision_config]
    before = [part._attn_implementation for part in parts]
    assert len(set(before)) == 2
    with attention_routed(model):
        assert model.config.text_config._attn_implementation == ATTENTION_NAME
    assert [part._attn_implementation for part in parts] == before


def test_what_the_user_changes_meanwhile_stays() -> None:
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
def test_a_model_that_cannot_be_attached_is_left_as_it_was(
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


class _Plain:
    value = 0


def test_a_hold_may_be_released_in_the_middle_of_another() -> None:
    """As a garbage collection does, which may come at any allocation."""
    shared = _Plain()
    first = AttributeOverrides([(shared, "value")])
    shared.value = 1
    first.record()

    def attributes() -> Iterator[tuple[object, str]]:
        yield shared, "value"
        first.release()
        yield shared, "other"

    second = AttributeOverrides(attributes())
    assert shared.value == 1, "the second holds it"
    shared.other = 2  # type: ignore[attr-defined]
    second.record()
    second.release()
    second.release()
    assert shared.value == 0
    assert not hasattr(shared, "other")


def test_an_interrupted_hold_holds_nothing() -> None:
    shared = _Plain()

    def attributes() -> Iterator[tuple[object, str]]:
        yield shared, "value"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        AttributeOverrides(attributes())
    hold = AttributeOverrides([(shared, "value")])
    shared.value = 1
    hold.record()
    hold.release()
    assert shared.value == 0


def test_a_copy_of_an_attached_model_is_a_model_of_its_own() -> None:
    model = tiny_model("llama")
    with attention_routed(model):
        copied = copy.deepcopy(model)
    assert model.config._attn_implementation != ATTENTION_NAME
    copied.set_attn_implementation("eager")
    with attention_routed(copied):
        assert model.config._attn_implementation != ATTENTION_NAME
