"""Examine a model from its config alone, without weights.

The model is built on the meta device and run there. A model that is not supported is refused before
any weight is read. What depends on values, such as a loop over the experts that tokens select, is
determined when an engine starts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from compiled_llm.errors import NeedsWeightsError, UnsupportedModelError
from compiled_llm.models.attention_routing import attention_routed
from compiled_llm.models.discovery import AttentionLayer, count_rotary_embeddings, examine_model
from compiled_llm.models.model_features import list_features
from compiled_llm.models.recurrent_state import RecurrentState
from compiled_llm.models.rotary import fixed_frequencies
from compiled_llm.models.state_discovery import discover_states
from compiled_llm.models.vocabulary import check_vocabulary
from compiled_llm.models.weight_packing import linears_by_input


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """The facts about a model that an engine would find.

    Attributes:
        model_type: transformers' name of the architecture.
        num_parameters: of all weights; tied ones count once.
        layers: attention layers in call order.
        states: recurrent states of other layers.
        features: features of the attention, in words (see `list_features`).
        rotary_embeddings: how many rotary embeddings a step computes.
        merged_projections: for each group of linear layers that would be packed, their names.
    """

    model_type: str
    num_parameters: int
    layers: tuple[AttentionLayer, ...]
    states: tuple[RecurrentState, ...]
    features: tuple[str, ...]
    rotary_embeddings: int
    merged_projections: tuple[tuple[str, ...], ...]


def examine_config(
    config: PretrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> ModelSummary:
    """Build the config's model on the meta device and examine it.

    Raises:
        UnsupportedModelError: the model needs a feature that is not supported.
        NeedsWeightsError: the result depends on the weights.
    """
    check_not_quantized(config)
    if type(config) not in AutoModelForCausalLM._model_mapping and not hasattr(config, "auto_map"):
        raise UnsupportedModelError(
            f"{config.model_type}: transformers has no causal LM of this type"
        )
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, **code_arguments(config, trust_remote_code)
        )
    with attention_routed(model), fixed_frequencies(model):
        with linears_by_input(model) as groups:
            served, layers = examine_model(model)
        check_vocabulary(model)
        names = {module: name for name, module in model.named_modules()}
        return ModelSummary(
            model_type=config.model_type,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            layers=tuple(layers),
            states=tuple(discover_states(model)),
            features=tuple(list_features(served, layers)),
            rotary_embeddings=count_rotary_embeddings(model),
            merged_projections=tuple(tuple(names[module] for module in group) for group in groups),
        )


def code_arguments(config: PretrainedConfig, trust_remote_code: bool) -> dict[str, Any]:
    """Return the arguments with which `from_config` uses a checkpoint's code from its own commit.

    By default, `from_config` uses the newest code and registers it for the config's class, which
    `from_pretrained` then uses as well.
    """
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    reference = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    commit, mapping = getattr(config, "_commit_hash", None), AutoModelForCausalLM._model_mapping
    if not trust_remote_code or reference is None or commit is None:
        return arguments
    is_registered = type(config) in mapping and not mapping[type(config)].__module__.startswith(
        "transformers."
    )
    repository = reference.partition("--")[0] if "--" in reference else config.name_or_path
    if is_registered or repository != config.name_or_path:
        return arguments
    return {**arguments, "code_revision": commit}


def check_supported(
    config: PretrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> None:
    """Raise `UnsupportedModelError` if the config shows that the model is not supported."""
    try:
        examine_config(config, dtype, trust_remote_code=trust_remote_code)
    except NeedsWeightsError:
        return


def check_not_quantized(config: PretrainedConfig) -> None:
    """Raise `UnsupportedModelError` for a checkpoint with quantised weights."""
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found is None:
            continue
        is_mapping = isinstance(found, dict)
        method = found.get("quant_method") if is_mapping else getattr(found, "quant_method", None)
        name = getattr(method, "value", method) or "an unnamed method"
        raise UnsupportedModelError(
            f"{config.model_type}: weights quantised by {name} are not supported: use a "
            "checkpoint in bfloat16, float16 or float32, or a .gguf file, whose weights are "
            "dequantised"
        )
