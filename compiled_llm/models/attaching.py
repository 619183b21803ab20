"""A model whose attention calls us, for as long as an engine works on it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from compiled_llm.models.attention import ATTENTION_NAME


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
def attached(model: PreTrainedModel) -> Iterator[None]:
    """Route the model's attention to us, in eval mode and without gradients; put everything back at the end."""
    attention, experts = model.config._attn_implementation, model.get_experts_implementation()
    training, trainable = model.training, [p for p in model.parameters() if p.requires_grad]
    try:
        route(model, ATTENTION_NAME)
        model.set_experts_implementation(_experts(model))
        model.eval().requires_grad_(False)
        yield
    finally:
        route(model, attention)
        model.set_experts_implementation(experts)
        model.train(training)
        for parameter in trainable:
            parameter.requires_grad_(True)


def _experts(model: PreTrainedModel) -> dict[str, str | None]:
    """The model's choice of experts, unless that waits for the device, as the grouped one does when compiled without bfloat16."""
    chosen = model.get_experts_implementation()
    if model.device.type == "cpu" or model.dtype == torch.bfloat16:
        return chosen
    return {name: "batched_mm" if choice == "grouped_mm" else choice for name, choice in chosen.items()}
