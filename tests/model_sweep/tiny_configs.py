"""Tiny configs: the smallest valid config of any config class, with every kind of layer.

Sizes follow from the names of the config's fields, and overrides.yaml replaces some. A variant of a
model type, such as `llama+yarn`, has the overrides of its type and then its own.
"""

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from transformers import CONFIG_MAPPING, PretrainedConfig

VOCAB_SIZE = 160
FIRST_TOKEN = 10  # ids of special tokens are smaller
MAX_LAYERS = 4

# Sizes of fields by name; the first pattern that matches the whole name applies.
_SIZES: list[tuple[str, int]] = [
    (r"vocab_size|vocab_size_per_layer_input", VOCAB_SIZE),
    (r"hidden_size|d_model|n_embd|dim_model|embedding_size", 64),
    (r"word_embed_proj_dim|emb_dim|lru_width", 64),
    (r"(num_)?(encoder_|decoder_)?(hidden_)?layers|n_layers?", 2),
    (r"(num_|swa_num_)?(encoder_|decoder_)?attention_heads|n_heads?|num_heads", 4),
    (r"(swa_)?num_(key_value|kv)_heads", 2),
    (r"(swa_|global_)?head_dim|d_kv|dim_head|d_head|kv_channels", 16),
    (r"attention_head_dim|attention_head_size", 16),
    (r"(\w+_)?intermediate_size(_mlp)?|(\w+_)?ffn_dim|n_inner|(\w+_)?ffn_hidden_size", 96),
    (r"dff|dim_ff|d_inner|feed_forward_size", 96),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len", 256),
    (r"max_target_positions|context_length", 256),
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
    (r"linear_num_key_heads|linear_num_value_heads|linear_num_heads", 4),
    (r"mamba_n_heads|mamba_num_heads", 4),
    (r"linear_key_head_dim|linear_value_head_dim|linear_head_dim", 16),
    (r"(mamba_d_state|state_size|ssm_state_size)", 8),
    (r"(mamba_)?chunk_size", 16),
    (r"hidden_size_per_layer_input|laurel_rank|index_head_dim|router_hidden_size", 16),
    (r"index_n_heads", 2),
    (r"index_topk|index_block_size|floor_scale", 8),
    (r"index_topk_blocks|moe_num_shared_experts|num_shared_experts|n_shared_experts", 1),
]
_SPECIAL_TOKEN = re.compile(
    r"(\w+_)?(token_id|token_index)|unk_index|mask_index|pad_index|eos_index|bos_index|lang_id"
)
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LAYER_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "decoder_layers",
)


def tiny_config(name: str) -> PretrainedConfig:
    """Return the tiny config of a model type or variant.

    Errors of the config class pass through, such as one for sizes that do not match.
    """
    model_type = name.partition("+")[0]
    config_class = CONFIG_MAPPING[model_type]
    values = _merged(_tiny_values(config_class()), _overrides().get(model_type, {}))
    if is_variant(name):
        values = _merged(values, _overrides()[name])
    config: PretrainedConfig = config_class(**values)
    return config


def is_variant(name: str) -> bool:
    """Return whether a name is that of a variant rather than of a model type."""
    return "+" in name


def variants() -> list[str]:
    """Return the names of all variants."""
    return [name for name in _overrides() if is_variant(name)]


@cache
def _overrides() -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = yaml.safe_load(
        (Path(__file__).parent / "overrides.yaml").read_text()
    )
    return values


def _tiny_values(default: PretrainedConfig) -> dict[str, Any]:
    """Return constructor arguments for the fields, and nested configs, that have a tiny size."""
    values = {name: value for name, value in default.to_dict().items() if name in _fields(default)}
    layers = _selected_layers(values)
    tiny: dict[str, Any] = {}
    for name, value in values.items():
        nested = vars(default).get(name)
        if isinstance(nested, PretrainedConfig):
            tiny[name] = {**_tiny_values(nested), "model_type": nested.model_type}
        elif layers and isinstance(value, list | tuple) and len(value) == _num_layers(values):
            tiny[name] = [value[number] for number in layers]
        elif (size := _size(name, value)) is not None:
            tiny[name] = size
    for name in _LAYER_COUNTS:
        if name in tiny and layers:
            tiny[name] = len(layers)
    _match_latent_attention(tiny)
    return tiny


def _match_latent_attention(tiny: dict[str, Any]) -> None:
    """Make sizes consistent for latent attention (MLA), where `head_dim` is the rotated part."""
    if "qk_rope_head_dim" in tiny and "head_dim" in tiny:
        tiny["head_dim"] = tiny["qk_rope_head_dim"]
    if "kv_lora_rank" in tiny:
        tiny["num_key_value_heads"] = tiny["num_attention_heads"]


def _fields(config: PretrainedConfig) -> set[str]:
    return set(config.to_dict()) - {
        "model_type",
        "transformers_version",
        "architectures",
        "dtype",
        "id2label",
        "label2id",
    }


def _size(name: str, value: object) -> int | None:
    """Return the tiny value of a field, or None if its default stays."""
    if _SPECIAL_TOKEN.fullmatch(name):
        return _token_id(name, value)
    if not _is_int(value) or value == 0:
        return None
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, name):
            return size if value > size or "vocab" in name else None
    return None


def _token_id(name: str, value: object) -> int | None:
    """Return an id within the vocabulary that random prompts do not contain."""
    if name in _TOKENS:
        return _TOKENS[name]
    return 3 + len(name) % (FIRST_TOKEN - 3) if _is_int(value) and value > 2 else None


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _num_layers(values: dict[str, Any]) -> int:
    return next((values[name] for name in _LAYER_COUNTS if isinstance(values.get(name), int)), 0)


def _selected_layers(values: dict[str, Any]) -> list[int]:
    """Return the numbers of layers that cover each kind of layer once; at least two layers.

    The kind of a layer follows from all lists that have an entry for each layer. Returns an empty
    list without such lists.
    """
    count = _num_layers(values)
    lists = [
        value
        for value in values.values()
        if isinstance(value, list | tuple) and len(value) == count and count > 1
    ]
    if not lists:
        return []
    selected = list[int]()
    seen = set[str]()
    for number in range(count):
        kind = repr([value[number] for value in lists])
        if kind not in seen and len(selected) < MAX_LAYERS:
            seen.add(kind)
            selected.append(number)
    for number in range(count):
        if len(selected) < 2 and number not in selected:
            selected.append(number)
    return sorted(selected)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = (
            _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged
