"""A tiny random model whose outputs depend on all of its inputs."""

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


def tiny_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a random float32 model.

    Weights are large enough that attention, positions and every layer affect the logits.
    """
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in dict.fromkeys(model.parameters()):
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(scale * torch.randn_like(parameter))
    return model
