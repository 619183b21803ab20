"""A model whose attention calls us, for as long as an engine works on it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from compiled_llm.models.attention import ATTENTION_NAME
from compiled_llm.models.attribute_overrides import AttributeOverrides

# Where a config keeps its choices. The properties in front of them also write those of its sub-configs.
ATTENTION_CHOICE, _EXPERTS_CHOICE = (
    "_attn_implementation_internal",
    "_experts_implementation_internal",
)


def route(model: nn.Module, attention: str) -> None:
    """Let the model's attention go to the function of this name; where it goes through no such function, leave it."""
    if not isinstance(model, PreTrainedModel):
        return
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)  # it would say of some that they cannot be told
        model.set_attn_implementation(attention)
    finally:
        logger.setLevel(level)


@contextmanager
def attention_routed(model: PreTrainedModel) -> Iterator[None]:
    """Route the model's attention to us, in eval mode and without gradients.

    At the end everything is put back that was changed here, unless another engine still works on the model, or on one that
    shares its config or its modules: then the last of them does so.
    """
    hold = AttributeOverrides(_attributes(model))
    try:
        try:
            route(model, ATTENTION_NAME)
            model.set_experts_implementation(_experts(model))
            model.eval().requires_grad_(False)
        finally:
            hold.note_changes()
        yield
    finally:
        hold.release()


def configs_of(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Those of the model and its modules, and their sub-configs, each once."""
    found: dict[int, PretrainedConfig] = {}
    remaining = [getattr(module, "config", None) for module in model.modules()]
    while remaining:
        config = remaining.pop()
        if isinstance(config, PretrainedConfig) and id(config) not in found:
            found[id(config)] = config
            remaining += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())


def _attributes(model: PreTrainedModel) -> Iterator[tuple[Any, str]]:
    """All that `attached` changes."""
    for config in configs_of(model):
        yield config, ATTENTION_CHOICE
        yield config, _EXPERTS_CHOICE
    for module in model.modules():
        yield module, "training"
    for parameter in model.parameters():
        yield parameter, "requires_grad"


def _experts(model: PreTrainedModel) -> dict[str, str | None]:
    """The model's choice of experts, unless that waits for the device, as the grouped one does when compiled without bfloat16."""
    chosen = model.get_experts_implementation()
    if model.device.type == "cpu" or model.dtype == torch.bfloat16:
        return chosen
    return {
        name: "batched_mm" if choice == "grouped_mm" else choice for name, choice in chosen.items()
    }
