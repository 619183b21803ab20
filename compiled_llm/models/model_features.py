"""Describe the features of a model's attention in words."""

from collections.abc import Sequence

from compiled_llm.models.discovery import AttentionLayer
from compiled_llm.models.exported_model import ExportedModel, ServedModel


def list_features(model: ServedModel, layers: Sequence[AttentionLayer]) -> list[str]:
    """Return the features of the model beyond causal attention with equally many heads."""
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", len(layers))
    reaches = {layer.reach for layer in layers}
    kinds = {reach.kind for reach in reaches}
    heads = {
        (layer.num_heads, layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in layers
    }
    found = {
        "windows": "sliding" in kinds,
        "chunks": "chunked" in kinds,
        "all tokens": "full" in kinds and len(reaches) > 1,
        "softcap": any(layer.softcap for layer in layers),
        "sinks": any(layer.sinks for layer in layers),
        "ALiBi": any(layer.alibi for layer in layers),
        "attention of its own": isinstance(model, ExportedModel),
        "shared key heads": any(layer.num_heads > layer.num_kv_heads for layer in layers),
        "keys and values of different dims": any(
            layer.key_dim != layer.value_dim for layer in layers
        ),
        "heads that differ by layer": len(heads) > 1,
        "several calls a layer": len(layers) > num_layers,
        "experts": any(name.endswith("experts") for name, _ in model.named_modules()),
    }
    return [name for name, is_present in found.items() if is_present]
