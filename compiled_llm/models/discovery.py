"""What attention a model asks for, found by running it once on one token with an attention that only takes notes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig, PreTrainedModel

from compiled_llm.errors import NeedsWeightsError, UnsupportedModelError
from compiled_llm.models.attention import (
    ATTENTION_NAME,
    CURRENT,
    Attention,
    AttentionCall,
)
from compiled_llm.models.attention_routing import route
from compiled_llm.models.exported_model import ServedModel, trace
from compiled_llm.models.mask_probe import MASK_PROBE_NAME
from compiled_llm.models.model_call import ModelCall, PositionsCache
from compiled_llm.models.recurrent_state import (
    RecurrentState,
    RecurrentStates,
    empty_state_cache,
    states_of,
)
from compiled_llm.system.compiler_lock import eager_steps_excluded
from passes.attention_reach import AttentionReach

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_OTHER_LAYERS = {"linear_attention", "conv", "hybrid", "hybrid_sliding", "mlp", "moe"}
_FEW = 8  # tokens of a sequence that is short for any model
_NEAR = 1000  # the largest position of a token that is compared; small frequencies show at large positions only


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayer:
    """One attention call of a forward, in call order.

    Attributes:
        name: the module that calls.
        num_heads, num_kv_heads: G of the latter, each shared by as many of the former.
        key_dim, value_dim: elements a head.
        window: how many tokens back a query sees, itself included; 0 for all; -C for those of its own chunk of C tokens.
        softcap: of its scores, 0 for none; sinks: whether scores of sinks take part; alibi: whether scores fall with distance.
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
        return self.num_kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class OwnAttentionError(UnsupportedModelError):
    """Some attention of the model does not go through the interface, or needs a cache of the model's own."""


def examine_model(model: PreTrainedModel) -> tuple[ServedModel, list[AttentionLayer]]:
    """An attached model in the form in which its attention calls us, and its attention layers.

    Raises:
        UnsupportedModelError: naming the feature that is not served.
        UndecidedError: on the meta device, where only weights can tell.
    """
    try:
        return model, discover_attention_layers(model)
    except OwnAttentionError:
        if empty_state_cache(model.config) is not None:
            raise
    traced = trace(model)
    return traced, discover_attention_layers(traced)


def discover_attention_layers(model: ServedModel) -> list[AttentionLayer]:
    """The attention layers of an attached model.

    Raises:
        UnsupportedModelError: naming the feature that is not served.
    """
    config = model.config.get_text_config()
    _check_layer_types(config)
    notes = _Notes({module: name for name, module in model.named_modules()})
    states = discover_states(model)
    with _examined(model, notes):
        _forward_alone(model, [0] * 4)
    if not states:
        _check_calls(config, notes.layers)
    return notes.layers


def supports_state_continuation(model: ServedModel) -> bool:
    """Whether several tokens at once go on from the states, if there are any, as one token does; some models only begin so."""
    cache = empty_state_cache(model.config)
    if cache is None:
        return True
    with _examined(model, _attend_to_itself):
        whole = _forward_alone(model, [1, 2, 3, 4])[2:].float()
        _call(model, [[1, 2]], cache, [[0, 1]])
        rest = _call(model, [[3, 4]], cache, [[2, 3]])[0].float()
    return _alike(whole, rest, model.dtype)


def allocate_states(model: ServedModel, num_rows: int) -> RecurrentStates | None:
    """Slots for the states of so many sequences at once; None where the model has no states."""
    cache = empty_state_cache(model.config)
    return (
        None
        if cache is None
        else RecurrentStates(discover_states(model), len(cache.layers), num_rows, model.device)
    )


def discover_states(model: ServedModel) -> list[RecurrentState]:
    """What layers of an attached model remember of a sequence besides keys and values."""
    cache = empty_state_cache(model.config)
    if cache is None:
        return []
    with _examined(model, _attend_to_itself):
        _call(model, [[0] * 4], cache, [[0, 1, 2, 3]])
    return states_of(cache)


def check_token_independence(model: ServedModel, max_model_len: int) -> None:
    """Check that a token which attends to itself alone has the same logits beside any others, at any positions of theirs.

    Raises:
        UnsupportedModelError: tokens meet elsewhere, as in a convolution, or in attention outside the interface, or their
            positions are not those that the model is told, or what is done to one depends on the largest position of all.
    """
    kind, said = (
        model.config.model_type,
        "a token's logits depend on the largest position in its batch",
    )
    with _examined(model, _attend_to_itself):
        try:
            if _independent(model, max_model_len):
                return
        except UnsupportedModelError as error:
            said = f"its forward fails ({error.__cause__})"
        if not _independent(model, min(max_model_len, _FEW)):
            raise UnsupportedModelError(
                f"{kind}: its tokens meet outside of attention, or take their place in a row for their position, "
                "which is not supported"
            )
        length = _independent_length(model, max_model_len)
    remedy = (
        f" to at most {length}" if length < max_model_len - 1 else ""
    )  # else the model remembers the longest so far
    raise UnsupportedModelError(
        f"{kind}: with positions up to {max_model_len - 1}, {said}, which is not supported: "
        f"lower limits.max_model_len={max_model_len}{remedy}"
    )


def _independent(model: ServedModel, max_model_len: int) -> bool:
    """Whether a token has the same logits at any place beside any others: small positions alone, larger ones, the largest."""
    far = max_model_len - 1
    low, near = min(far, _FEW - 1), min(far // 2, _NEAR)
    call = _forward_alone if empty_state_cache(model.config) is None else _forward_rows
    first = call(model, [0, 0, 1], [0, 0, low])[2].float()
    second = call(model, [0, 1, 1], [0, near, low])[[1, 2]].float()
    third = call(model, [1, 2, 1], [low, far, near])[[2, 0]].float()
    return _alike(second, third, model.dtype) and _alike(second[1], first, model.dtype)


def _independent_length(model: ServedModel, too_long: int) -> int:
    """The largest `max_model_len` below `too_long` for which tokens are independent, by bisection."""
    length = min(too_long, _FEW)
    while too_long - length > 1:
        middle = (length + too_long) // 2
        try:
            independent = _independent(model, middle)
        except UnsupportedModelError:
            independent = False
        length, too_long = (middle, too_long) if independent else (length, middle)
    return length


@contextmanager
def _examined(model: ServedModel, attention: Attention) -> Iterator[None]:
    """Attention calls do this meanwhile, and masks are built only to learn how far they reach."""
    with eager_steps_excluded(), torch.no_grad():  # another engine's may be of this model
        try:
            route(model, MASK_PROBE_NAME)
            CURRENT.attention = attention
            yield
        finally:
            CURRENT.attention = None
            route(model, ATTENTION_NAME)


def _forward_alone(
    model: ServedModel, ids: list[int], positions: list[int] | None = None
) -> Tensor:
    """Logits [T, V] of these tokens in one row; as a sequence's first, unless their positions are given."""
    positions = positions or list(range(len(ids)))
    cache = empty_state_cache(model.config) or PositionsCache(
        torch.tensor(positions, device=model.device)
    )
    return _call(model, [ids], cache, [positions])[0]


def _forward_rows(model: ServedModel, ids: list[int], positions: list[int]) -> Tensor:
    """Logits [R, V] of these tokens in a row each, with empty states."""
    cache = empty_state_cache(model.config)
    assert cache is not None
    return _call(model, [[token] for token in ids], cache, [[position] for position in positions])[
        :, 0
    ]


def _call(model: ServedModel, ids: list[list[int]], cache: Cache, at: list[list[int]]) -> Tensor:
    """Logits [R, T, V] of ids and positions [R, T]."""
    tokens, positions = (
        torch.tensor(ids, device=model.device),
        torch.tensor(at, device=model.device),
    )
    masks = {"attention_mask": torch.ones_like(tokens)}
    if model.device.type == "meta" and not isinstance(cache, PositionsCache):
        masks = {}  # layers with states look whether it masks anything
    try:
        return ModelCall(model).call(tokens, positions, cache, **masks)
    except (torch.OutOfMemoryError, UnsupportedModelError):
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if model.device.type == "meta" and "meta" in str(error):
            raise NeedsWeightsError(
                f"{model.config.model_type}: what its forward does depends on values ({error})"
            ) from error
        kind, said = (
            model.config.model_type,
            (str(error).strip().splitlines() or [type(error).__name__])[0],
        )
        if isinstance(error, AttributeError | IndexError):
            raise UnsupportedModelError(
                f"{kind}: it keeps what it remembers in a cache of its own kind ({said}), which is not supported"
            ) from error
        raise OwnAttentionError(
            f"{kind}: its forward needs the cache's length as a number, while sequences in a batch differ in theirs ({said}), "
            "which is not supported"
        ) from error


def _alike(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Equal but for rounding: experts may get other tokens beside theirs, and scans go in other pieces."""
    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    return bool((one - other).abs().max() <= tolerance * one.abs().max())


def _attend_to_itself(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
) -> Tensor:
    """A token's own value, scaled by its own query and key, so that what is done to those for its position shows."""
    k, v = (
        heads[:, :, -q.shape[2] :] for heads in (k, v)
    )  # a cache may put what came before in front
    k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1) for heads in (k, v))
    return ((1 + _shown(q) + _shown(k)) * v).transpose(1, 2).contiguous()


def _shown(heads: Tensor) -> Tensor:
    """[..., 1] between -2 and 2: changes with the direction of each head, and with its length."""
    heads_float = heads.float()
    fixed = torch.arange(1, heads.shape[-1] + 1, device=heads.device).cos()
    cosine = nn.functional.cosine_similarity(heads_float, fixed, dim=-1)
    length = heads_float.norm(dim=-1).clamp(min=1e-6)
    shown: Tensor = (cosine * heads.shape[-1] ** 0.5).sin() + (4 * length.log()).sin()
    return shown[..., None].to(heads.dtype)


def count_rotary_embeddings(model: ServedModel) -> int:
    """How many rotary embeddings a step computes: one, or one for each layer type there is that has parameters of its own."""
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None)
    if not parameters or not any(name.endswith("inv_freq") for name, _ in model.named_buffers()):
        return 0
    nested = {name for name, value in parameters.items() if isinstance(value, dict)}
    return len(nested & set(getattr(config, "layer_types", None) or nested)) or 1


@dataclass
class _Notes:
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
        if not call.is_causal:
            raise UnsupportedModelError(
                f"{layer.name}: bidirectional attention (is_causal=False) is not supported"
            )
        if layer.num_heads % layer.num_kv_heads:
            raise UnsupportedModelError(
                f"{layer.name}: {layer.num_heads} heads cannot share {layer.num_kv_heads} key heads evenly"
            )
        if max(layer.key_dim, layer.value_dim) > 256:
            raise UnsupportedModelError(
                f"{layer.name}: head dims over 256 are not supported, got {layer.key_dim} and {layer.value_dim}"
            )
        self.layers.append(layer)
        return v.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])


def _check_layer_types(config: PretrainedConfig) -> None:
    others = sorted(
        set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS - _OTHER_LAYERS
    )
    if others:
        raise UnsupportedModelError(
            f"{config.model_type}: layers of type {', '.join(others)} are not supported"
        )


def _check_calls(config: PretrainedConfig, layers: list[AttentionLayer]) -> None:
    """Every layer calls attention, as often as the others."""
    if not layers:
        raise OwnAttentionError(
            f"{config.model_type}: its attention does not go through transformers' attention interface"
        )
    names = dict.fromkeys(layer.name for layer in layers)
    if len(layers) % config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{config.model_type}: its config has {config.num_hidden_layers} layers, but attention was called {len(layers)} times, "
            f"by {', '.join(names)}"
        )
