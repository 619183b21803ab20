"""What attention a model asks for, found by running it once on one token with an attention that only takes notes."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from compiled_llm.models.attention import ATTENTION_NAME, CURRENT, AttentionCall, UnsupportedModelError

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayer:
    """One attention call of a forward, in call order. `window` is in tokens, 0 for none; dims are in elements a head."""

    name: str
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


@contextmanager
def attached(model: PreTrainedModel) -> Iterator[None]:
    """Route the model's attention to us, in eval mode and without gradients; put everything back at the end."""
    attention, experts = model.config._attn_implementation, model.get_experts_implementation()
    training, trainable = model.training, [p for p in model.parameters() if p.requires_grad]
    try:
        model.set_attn_implementation(ATTENTION_NAME)
        model.set_experts_implementation(_experts(model))
        model.eval().requires_grad_(False)
        yield
    finally:
        model.set_attn_implementation(attention)
        model.set_experts_implementation(experts)
        model.train(training)
        for parameter in trainable:
            parameter.requires_grad_(True)


def discover(model: PreTrainedModel) -> list[AttentionLayer]:
    """The attention layers of an attached model.

    Raises:
        UnsupportedModelError: naming the feature that is not served.
    """
    config = model.config.get_text_config()
    _check_layer_types(config)
    _check_forward(model)
    notes = _Notes({module: name for name, module in model.named_modules()})
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    try:
        CURRENT.attention = notes
        with torch.no_grad():
            model(input_ids=token, position_ids=token, use_cache=False)
    finally:
        CURRENT.attention = None
    _check_calls(config, notes.layers)
    return notes.layers


def _experts(model: PreTrainedModel) -> dict[str, str | None]:
    """The model's choice of experts, unless that waits for the device, as the grouped one does when compiled without bfloat16."""
    chosen = model.get_experts_implementation()
    if model.device.type == "cpu" or model.dtype == torch.bfloat16:
        return chosen
    return {name: "batched_mm" if choice == "grouped_mm" else choice for name, choice in chosen.items()}


def count_rotary_embeddings(config: PretrainedConfig) -> int:
    """How many rotary embeddings a step computes: one, or one for each layer type that has parameters of its own."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None)
    if not parameters:
        return 0
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return len(nested) or 1


@dataclass
class _Notes:
    names: dict[nn.Module, str]
    layers: list[AttentionLayer] = field(default_factory=list)

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        layer = AttentionLayer(
            name=self.names.get(module, type(module).__name__),
            num_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            key_dim=k.shape[3],
            value_dim=v.shape[3],
            window=call.window,
            dtype=k.dtype,
        )
        if layer.num_heads % layer.num_kv_heads:
            raise UnsupportedModelError(f"{layer.name}: {layer.num_heads} heads cannot share {layer.num_kv_heads} key heads evenly")
        if max(layer.key_dim, layer.value_dim) > 256:
            raise UnsupportedModelError(
                f"{layer.name}: head dims over 256 are not supported, got {layer.key_dim} and {layer.value_dim}"
            )
        self.layers.append(layer)
        return v.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])


def _check_layer_types(config: PretrainedConfig) -> None:
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS)
    if others:
        raise UnsupportedModelError(f"{config.model_type}: layers of type {', '.join(others)} are not supported")


def _check_forward(model: PreTrainedModel) -> None:
    accepted = inspect.signature(model.forward).parameters
    missing = [name for name in ("position_ids", "logits_to_keep") if name not in accepted]
    if missing:
        raise UnsupportedModelError(f"{model.config.model_type}: its forward takes no {' and no '.join(missing)}")


def _check_calls(config: PretrainedConfig, layers: list[AttentionLayer]) -> None:
    """Every layer of the config calls attention once, and windows reach the call rather than hide in a mask."""
    kind, num_layers = config.model_type, config.num_hidden_layers
    if not layers:
        raise UnsupportedModelError(f"{kind}: its attention does not go through transformers' attention interface")
    if len(layers) != num_layers:
        seen = ", ".join(layer.name for layer in layers)
        raise UnsupportedModelError(
            f"{kind}: its config has {num_layers} layers, but attention was called {len(layers)} times, by {seen}"
        )
    types = getattr(config, "layer_types", None)
    if types is None:
        slides = bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
        types = ["sliding_attention" if slides else "full_attention"] * num_layers
    for layer, layer_type in zip(layers, types, strict=True):
        if layer_type == "sliding_attention" and not layer.window:
            raise UnsupportedModelError(f"{kind}: the sliding window of {layer.name} is only in its mask, which is not supported")
