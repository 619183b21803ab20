"""Tests of `ModelGuard`: it detects changes to a model that an engine uses."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from compiled_llm.models.attention_routing import attention_routed
from compiled_llm.models.mask_probe import MASK_PROBE_NAME
from compiled_llm.models.model_guard import ModelGuard
from tests.helpers.tiny_models import tiny_model


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    model = tiny_model("llama")
    with attention_routed(model):
        yield model


def _train(model: PreTrainedModel) -> None:
    model.train()


def _change_attention(model: PreTrainedModel) -> None:
    model.set_attn_implementation("eager")


def _replace_module(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp = nn.Identity()


def _move_weight(model: PreTrainedModel) -> None:
    weight = model.model.norm.weight
    weight.data = weight.data.clone()


CHANGES = {
    _train: "expected the model in eval mode .*, got training mode: call model.eval",
    _change_attention: "the model's attention implementation was changed",
    _replace_module: "the model's module model.layers.1.mlp was replaced",
    _move_weight: "the model's weight model.norm.weight was moved .*: close this engine",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_named(
    model: PreTrainedModel, change: Callable[[PreTrainedModel], None]
) -> None:
    guard = ModelGuard(model, compiled=True)
    guard.check()
    change(model)
    with pytest.raises(RuntimeError, match=CHANGES[change]):
        guard.check()


def test_eager_steps_allow_other_weights_and_modules(model: PreTrainedModel) -> None:
    guard = ModelGuard(model, compiled=False)
    _replace_module(model)
    _move_weight(model)
    guard.check()


def test_values_may_change_and_other_engines_may_examine(model: PreTrainedModel) -> None:
    guard = ModelGuard(model, compiled=True)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.set_attn_implementation(MASK_PROBE_NAME)
    guard.check()
