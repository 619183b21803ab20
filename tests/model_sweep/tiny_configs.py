"""Any config class -> the smallest legal config with every kind of layer: sizes by the names of its fields, then overrides.

A variant of a model type, such as `llama+yarn`, has the overrides of its type and then its own.
"""

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from transformers import CONFIG_MAPPING, PretrainedConfig

VOCAB_SIZE = 160
FIRST_TOKEN = 10  # special ids lie below
MAX_LAYERS = 4

# The first pattern that matches all of a field's name gives its size; None leaves the default.
_SIZES: list[tuple[str, int | None]] = [
    (r"vocab_size|vocab_size_per_layer_input", VOCAB_SIZE),
    (
        r"hidden_size|d_model|n_embd|dim_model|embedding_size|word_embed_proj_dim|emb_dim|lru_width",
        64,
    ),
    (r"(num_)?(encoder_|decoder_)?(hidden_)?layers|n_layers?", 2),
    (
        r"(num_|swa_num_)?(encoder_|decoder_)?attention_heads|n_heads?|num_heads|swa_num_attention_heads",
        4,
    ),
    (r"(swa_)?num_(key_value|kv)_heads|num_key_value_heads", 2),
    (
        r"(swa_|global_)?head_dim|d_kv|dim_head|d_head|kv_channels|attention_head_dim|attention_head_size",
        16,
    ),
    (
        r"(\w+_)?intermediate_size(_mlp)?|(\w+_)?ffn_dim|n_inner|(\w+_)?ffn_hidden_size|dff|dim_ff|d_inner|feed_forward_size",
        96,
    ),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|context_length",
        256,
    ),
    (r"sliding_window(_size)?|attention_window_size|window_size", 24),
    (r"attention_chunk_size", 32),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k", 2),
    (r"n_group|num_expert_group|topk_group", 1),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"kv_lora_rank|q_lora_rank", 16),
    (r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim", 8),
    (r"qk_head_dim", 16),
    (r"v_head_dim", 12),
    (
        r"linear_num_key_heads|linear_num_value_heads|linear_num_heads|mamba_n_heads|mamba_num_heads",
        4,
    ),
    (r"linear_key_head_dim|linear_value_head_dim|linear_head_dim", 16),
    (r"(mamba_d_state|state_size|ssm_state_size)", 8),
    (r"(mamba_)?chunk_size", 16),
    (r"hidden_size_per_layer_input|laurel_rank|index_head_dim|router_hidden_size", 16),
    (r"index_n_heads", 2),
    (r"index_topk|index_block_size|floor_scale", 8),
    (r"index_topk_blocks|moe_num_shared_experts|num_shared_experts|n_shared_experts", 1),
]
_SPECIAL = re.compile(
    r"(\w+_)?(token_id|token_index)|unk_index|mask_index|pad_index|eos_index|bos_index|lang_id"
)
_LAYER_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "decoder_layers",
)


def tiny_config(name: str) -> PretrainedConfig:
    """The tiny config of a model type or variant; raises what its class raises when the sizes do not fit each other."""
    model_type = name.partition("+")[0]
    config_class = CONFIG_MAPPING[model_type]
    values = _merged(_shrunk(config_class()), _overrides().get(model_type, {}))
    config: PretrainedConfig = config_class(
        **(_merged(values, _overrides()[name]) if is_variant(name) else values)
    )
    return config


def is_variant(name: str) -> bool:
    """Whether a name is that of a variant and not of a model type."""
    return "+" in name


def variants() -> list[str]:
    """The names of all variants."""
    return [name for name in _overrides() if is_variant(name)]


@cache
def _overrides() -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = yaml.safe_load(
        (Path(__file__).parent / "overrides.yaml").read_text()
    )
    return values


def _shrunk(default: PretrainedConfig) -> dict[str, Any]:
    """Constructor arguments: every field of the default that has a smaller size, and the nested configs, shrunk."""
    values = {name: value for name, value in default.to_dict().items() if name in _fields(default)}
    layers = _kept_layers(values)
    changes: dict[str, Any] = {}
    for name, value in values.items():
        nested = vars(default).get(name)
        if isinstance(nested, PretrainedConfig):
            changes[name] = {**_shrunk(nested), "model_type": nested.model_type}
        elif layers and isinstance(value, list | tuple) and len(value) == _num_layers(values):
            changes[name] = [value[number] for number in layers]
        elif (size := _size(name, value)) is not None:
            changes[name] = size
    for name in _LAYER_COUNTS:
        if name in changes and layers:
            changes[name] = len(layers)
    if "qk_rope_head_dim" in changes and "head_dim" in changes:
        changes["head_dim"] = changes["qk_rope_head_dim"]  # in latent attention, what is rotated
    if "kv_lora_rank" in changes:
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    return changes


def _fields(config: PretrainedConfig) -> set[str]:
    return set(config.to_dict()) - {
        "model_type",
        "transformers_version",
        "architectures",
        "dtype",
        "id2label",
        "label2id",
    }


def _size(name: str, value: object) -> object:
    if _SPECIAL.fullmatch(name):
        return _special(name, value)
    if not isinstance(value, int) or isinstance(value, bool) or value == 0:
        return None
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, name):
            return size if size is None or value > size or "vocab" in name else None
    return None


def _special(name: str, value: object) -> object:
    """Ids that no prompt holds, and that the vocabulary has."""
    known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name in known:
        return known[name]
    return (
        3 + len(name) % (FIRST_TOKEN - 3)
        if isinstance(value, int) and not isinstance(value, bool) and value > 2
        else None
    )


def _num_layers(values: dict[str, Any]) -> int:
    return next((values[name] for name in _LAYER_COUNTS if isinstance(values.get(name), int)), 0)


def _kept_layers(values: dict[str, Any]) -> list[int]:
    """The numbers of layers that show each kind of layer once, by all lists that say something of each layer; at least two."""
    count = _num_layers(values)
    lists = [
        value
        for value in values.values()
        if isinstance(value, list | tuple) and len(value) == count and count > 1
    ]
    if not lists:
        return []
    kept, seen = list[int](), set[str]()
    for number in range(count):
        kind = repr([value[number] for value in lists])
        if kind not in seen and len(kept) < MAX_LAYERS:
            seen.add(kind)
            kept.append(number)
    for number in range(count):
        if len(kept) < 2 and number not in kept:
            kept.append(number)
    return sorted(kept)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = (
            _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged
