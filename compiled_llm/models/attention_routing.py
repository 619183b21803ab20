"""Route a model's attention calls to the engine, and restore the model afterwards."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from compiled_llm.models.attention import ATTENTION_NAME
from compiled_llm.models.attribute_overrides import AttributeOverrides

logger = logging.getLogger(__name__)

# The attributes of a config that store its implementations. The public properties in front of them
# also write those of its sub-configs.
ATTENTION_ATTRIBUTE = "_attn_implementation_internal"
_EXPERTS_ATTRIBUTE = "_experts_implementation_internal"


def route(model: nn.Module, attention: str) -> None:
    """Set the model's attention implementation, without transformers' warnings.

    A model that is not a `PreTrainedModel`, such as an exported one, is left as it is.
    """
    if not isinstance(model, PreTrainedModel):
        return
    transformers_logger = logging.getLogger("transformers.modeling_utils")
    level = transformers_logger.level
    try:
        transformers_logger.setLevel(logging.ERROR)  # it warns of models that ignore the setting
        model.set_attn_implementation(attention)
    finally:
        transformers_logger.setLevel(level)


@contextmanager
def attention_routed(model: PreTrainedModel) -> Iterator[None]:
    """Route the model's attention to the engine, in eval mode and without gradients.

    On exit all changed attributes are restored, unless another engine still uses the model, or one
    that shares its config or modules; then the last of them restores them.
    """
    overrides = AttributeOverrides(_attributes(model))
    try:
        try:
            route(model, ATTENTION_NAME)
            model.set_experts_implementation(_experts_implementation(model))
            model.eval().requires_grad_(False)
        finally:
            overrides.record()
        yield
    finally:
        overrides.release()


def configs_of(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Return the configs of the model and its modules, with their sub-configs, each once."""
    found: dict[int, PretrainedConfig] = {}
    remaining = [getattr(module, "config", None) for module in model.modules()]
    while remaining:
        config = remaining.pop()
        if isinstance(config, PretrainedConfig) and id(config) not in found:
            found[id(config)] = config
            remaining += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())


def _attributes(model: PreTrainedModel) -> Iterator[tuple[Any, str]]:
    """Yield every attribute that `attention_routed` changes."""
    for config in configs_of(model):
        yield config, ATTENTION_ATTRIBUTE
        yield config, _EXPERTS_ATTRIBUTE
    for module in model.modules():
        yield module, "training"
    for parameter in model.parameters():
        yield parameter, "requires_grad"


def _experts_implementation(model: PreTrainedModel) -> dict[str, str | None]:
    """Return the model's own choice, with `grouped_mm` replaced where it cannot be captured.

    Compiled for another dtype than bfloat16, `grouped_mm` synchronises with the GPU.
    """
    chosen = model.get_experts_implementation()
    if model.device.type == "cpu" or model.dtype == torch.bfloat16:
        return chosen
    replaced = {
        name: "batched_mm" if choice == "grouped_mm" else choice for name, choice in chosen.items()
    }
    if replaced != chosen and model.device.type != "meta":
        logger.warning(
            "the experts implementation is batched_mm instead of grouped_mm: compiled in %s, the "
            "latter synchronises with the GPU",
            model.dtype,
        )
    return replaced
