"""Find the attention layers of a model by running it once on a few tokens."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from compiled_llm.errors import UnsupportedModelError
from compiled_llm.models.attention import AttentionCall
from compiled_llm.models.exported_model import ServedModel, export_model
from compiled_llm.models.probe import OwnAttentionError, forward_row, probing
from compiled_llm.models.recurrent_state import empty_state_cache
from compiled_llm.models.state_discovery import discover_states
from passes.attention_reach import AttentionReach

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_OTHER_LAYERS = {"linear_attention", "conv", "hybrid", "hybrid_sliding", "mlp", "moe"}
_MAX_HEAD_DIM = 256  # the largest that the attention kernels are written for


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayer:
    """One attention call of a forward.

    Attributes:
        name: the module that calls, by its name in the model.
        num_heads: query heads H.
        num_kv_heads: key and value heads G; H is a multiple of G.
        key_dim: elements of a query or key head.
        value_dim: elements of a value head.
        reach: the keys that a query sees.
        softcap: scores become `softcap * tanh(scores / softcap)`; 0 for none.
        sinks: whether each head has a sink score.
        alibi: whether scores decrease with the distance of query and key (ALiBi).
        dtype: of keys and values.
    """

    name: str
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    reach: AttentionReach
    softcap: float
    sinks: bool
    alibi: bool
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's key and value."""
        return self.num_kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


def examine_model(model: PreTrainedModel) -> tuple[ServedModel, list[AttentionLayer]]:
    """Return the model in a form whose attention calls the engine, and its attention layers.

    The form is the model itself, or its exported graph where the model computes attention without
    transformers' attention interface.

    Args:
        model: a model whose attention is routed (see `attention_routed`).

    Raises:
        UnsupportedModelError: the model needs a feature that is not supported.
        NeedsWeightsError: on the meta device, the result depends on the weights.
    """
    try:
        return model, discover_attention_layers(model)
    except OwnAttentionError:
        if empty_state_cache(model.config) is not None:
            raise
    exported = export_model(model)
    return exported, discover_attention_layers(exported)


def discover_attention_layers(model: ServedModel) -> list[AttentionLayer]:
    """Return the attention layers of a routed model, in the order of their calls.

    Raises:
        UnsupportedModelError: the model needs a feature that is not supported.
    """
    config = model.config.get_text_config()
    _check_layer_types(config)
    recorder = _LayerRecorder({module: name for name, module in model.named_modules()})
    states = discover_states(model)
    with probing(model, recorder):
        forward_row(model, [0] * 4)
    if not states:
        _check_calls(config, recorder.layers)
    return recorder.layers


def count_rotary_embeddings(model: ServedModel) -> int:
    """Return how many rotary embeddings a step computes.

    That is one, or one for each layer type of the model that has rope parameters of its own.
    """
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None)
    if not parameters or not any(name.endswith("inv_freq") for name, _ in model.named_buffers()):
        return 0
    nested = {name for name, value in parameters.items() if isinstance(value, dict)}
    return len(nested & set(getattr(config, "layer_types", None) or nested)) or 1


@dataclass
class _LayerRecorder:
    """An attention function that records its calls and returns zeros."""

    names: dict[nn.Module, str]
    layers: list[AttentionLayer] = field(default_factory=list)

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> Tensor:
        layer = AttentionLayer(
            name=self.names.get(module, type(module).__name__),
            num_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            key_dim=k.shape[3],
            value_dim=v.shape[3],
            reach=call.reach,
            softcap=call.softcap,
            sinks=call.sinks is not None,
            alibi=call.slopes is not None,
            dtype=k.dtype,
        )
        _check_layer(layer, call)
        self.layers.append(layer)
        return v.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])


def _check_layer(layer: AttentionLayer, call: AttentionCall) -> None:
    if not call.is_causal:
        raise UnsupportedModelError(
            f"{layer.name}: bidirectional attention (is_causal=False) is not supported"
        )
    if layer.num_heads % layer.num_kv_heads:
        raise UnsupportedModelError(
            f"{layer.name}: expected a number of query heads that is a multiple of the number of "
            f"key heads, got {layer.num_heads} and {layer.num_kv_heads}, which is not supported"
        )
    if max(layer.key_dim, layer.value_dim) > _MAX_HEAD_DIM:
        raise UnsupportedModelError(
            f"{layer.name}: head dims over {_MAX_HEAD_DIM} are not supported, got {layer.key_dim} "
            f"for keys and {layer.value_dim} for values"
        )


def _check_layer_types(config: PretrainedConfig) -> None:
    types = set(getattr(config, "layer_types", None) or ())
    unsupported = sorted(types - _ATTENTION_LAYERS - _OTHER_LAYERS)
    if unsupported:
        raise UnsupportedModelError(
            f"{config.model_type}: layers of type {', '.join(unsupported)} are not supported"
        )


def _check_calls(config: PretrainedConfig, layers: list[AttentionLayer]) -> None:
    """Check that every layer calls attention, and all of them equally often."""
    if not layers:
        raise OwnAttentionError(
            f"{config.model_type}: its attention does not go through transformers' attention "
            "interface"
        )
    names = dict.fromkeys(layer.name for layer in layers)
    if len(layers) % config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{config.model_type}: expected as many attention calls from each of its "
            f"{config.num_hidden_layers} layers, got {len(layers)} calls, from {', '.join(names)}"
        )
