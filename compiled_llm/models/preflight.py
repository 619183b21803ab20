"""What can be told of a model from its config alone: it is built on the meta device, without weights, and examined there.

So a model that is not served is refused before any of its weights is read. What depends on values, such as a loop over the experts
that tokens chose, cannot be told like this; then an engine learns it when it starts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from compiled_llm.errors import NeedsWeightsError, UnsupportedModelError
from compiled_llm.models.attention_routing import attention_routed
from compiled_llm.models.discovery import (
    AttentionLayer,
    count_rotary_embeddings,
    discover_states,
    examine_model,
)
from compiled_llm.models.model_features import list_features
from compiled_llm.models.recurrent_state import RecurrentState
from compiled_llm.models.rotary import fixed_frequencies
from compiled_llm.models.weight_packing import linears_by_input


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """What an engine would find.

    Attributes:
        num_parameters: of all weights, tied ones counted once.
        layers: attention calls in call order; states: what other layers remember of a sequence.
        features: what the attention has besides plain causal attention of equal heads, in words.
        rotary_embeddings: a step; merged_projections: the names of linear layers whose weights would share a storage.
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
    """Examine a model of this config.

    Raises:
        UnsupportedModelError: naming the feature that is not served.
        UndecidedError: only its weights can tell.
    """
    check_not_quantized(config)
    if type(config) not in AutoModelForCausalLM._model_mapping and not hasattr(config, "auto_map"):
        raise UnsupportedModelError(
            f"{config.model_type}: transformers knows no causal LM of this type"
        )
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, **code_arguments(config, trust_remote_code)
        )
    with attention_routed(model), fixed_frequencies(model):
        with linears_by_input(model) as groups:
            served, layers = examine_model(model)
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
    """What `from_config` needs to take a checkpoint's own code from the commit that its config is of.

    By itself it takes the newest code, and registers that for the config's class, which `from_pretrained` then uses as well.
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
    return (
        arguments
        if is_registered or repository != config.name_or_path
        else {**arguments, "code_revision": commit}
    )


def check_supported(
    config: PretrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> None:
    """Raises UnsupportedModelError where the config tells that a model is not served."""
    try:
        examine_config(config, dtype, trust_remote_code=trust_remote_code)
    except NeedsWeightsError:
        return


def check_not_quantized(config: PretrainedConfig) -> None:
    """Raises UnsupportedModelError for a checkpoint of quantised weights, with the method's name."""
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            method = (
                found.get("quant_method")
                if isinstance(found, dict)
                else getattr(found, "quant_method", None)
            )
            raise UnsupportedModelError(
                f"{config.model_type}: weights quantised by {getattr(method, 'value', method) or 'an unnamed method'} are not "
                "supported: use a checkpoint in bfloat16, float16 or float32, or a .gguf file, whose weights are expanded"
            )
