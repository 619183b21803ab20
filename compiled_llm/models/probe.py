"""Run a model eagerly on a few tokens, with an attention function that only observes it.

Models are examined this way before an engine compiles them, also on the meta device.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import Cache

from compiled_llm.errors import NeedsWeightsError, UnsupportedModelError
from compiled_llm.models.attention import ATTENTION_NAME, CURRENT, Attention, AttentionCall
from compiled_llm.models.attention_routing import route
from compiled_llm.models.exported_model import ServedModel
from compiled_llm.models.mask_probe import MASK_PROBE_NAME
from compiled_llm.models.model_call import ModelCall, PositionsCache
from compiled_llm.models.recurrent_state import empty_state_cache
from compiled_llm.system.compiler_lock import eager_steps_excluded


class OwnAttentionError(UnsupportedModelError):
    """Some attention does not use transformers' interface, or needs a cache of the model's own."""


@contextmanager
def probing(model: ServedModel, attention: Attention) -> Iterator[None]:
    """Let attention calls run `attention`, and have masks built so that their reach is known."""
    with eager_steps_excluded(), torch.no_grad():  # another engine may run steps of this model
        try:
            route(model, MASK_PROBE_NAME)
            CURRENT.attention = attention
            yield
        finally:
            CURRENT.attention = None
            route(model, ATTENTION_NAME)


def forward_row(model: ServedModel, ids: list[int], positions: list[int] | None = None) -> Tensor:
    """Return the logits [T, V] of tokens in one row, at positions 0 to T - 1 unless given."""
    positions = positions or list(range(len(ids)))
    cache = empty_state_cache(model.config) or PositionsCache(
        torch.tensor(positions, device=model.device)
    )
    return forward(model, [ids], cache, [positions])[0]


def forward_rows(model: ServedModel, ids: list[int], positions: list[int]) -> Tensor:
    """Return the logits [R, V] of tokens in a row each, with empty states."""
    cache = empty_state_cache(model.config)
    assert cache is not None
    rows = [[token] for token in ids]
    return forward(model, rows, cache, [[position] for position in positions])[:, 0]


def forward(
    model: ServedModel, ids: list[list[int]], cache: Cache, positions: list[list[int]]
) -> Tensor:
    """Return the logits [R, T, V] of ids and positions [R, T].

    Raises:
        OwnAttentionError: the forward fails because of the cache it was given.
        UnsupportedModelError: the forward needs a cache of its own class.
        NeedsWeightsError: on the meta device, the forward reads the values of tensors.
    """
    tokens = torch.tensor(ids, device=model.device)
    places = torch.tensor(positions, device=model.device)
    masks = {"attention_mask": torch.ones_like(tokens)}
    if model.device.type == "meta" and not isinstance(cache, PositionsCache):
        masks = {}  # layers with states test whether the mask has a zero
    try:
        return ModelCall(model).call(tokens, places, cache, **masks)
    except (torch.OutOfMemoryError, UnsupportedModelError):
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise _explain(model, error) from error


def attend_to_self(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
) -> Tensor:
    """Return each token's own value, scaled by a function of its own query and key.

    The scale makes the logits depend on the rotary embedding and on whatever else changes queries
    and keys, while no token affects another.
    """
    # Keep the new tokens: a cache may have put earlier ones in front.
    k, v = (heads[:, :, -q.shape[2] :] for heads in (k, v))
    k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1) for heads in (k, v))
    return ((1 + _fingerprint(q) + _fingerprint(k)) * v).transpose(1, 2).contiguous()


def alike(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Return whether two results differ by rounding alone.

    Experts may compute a token together with others, and scans may split a sequence elsewhere, so
    equal inputs need not give equal bits.
    """
    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    return bool((one - other).abs().max() <= tolerance * one.abs().max())


def _fingerprint(heads: Tensor) -> Tensor:
    """Return [..., 1] between -2 and 2 that changes with each head's direction and length."""
    heads_float = heads.float()
    fixed = torch.arange(1, heads.shape[-1] + 1, device=heads.device).cos()
    cosine = nn.functional.cosine_similarity(heads_float, fixed, dim=-1)
    length = heads_float.norm(dim=-1).clamp(min=1e-6)
    result: Tensor = (cosine * heads.shape[-1] ** 0.5).sin() + (4 * length.log()).sin()
    return result[..., None].to(heads.dtype)


def _explain(model: ServedModel, error: Exception) -> Exception:
    """Return the exception that tells a user why a forward failed."""
    kind = model.config.model_type
    if model.device.type == "meta" and "meta" in str(error):
        return NeedsWeightsError(f"{kind}: its forward depends on the values of tensors ({error})")
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, AttributeError | IndexError):
        return UnsupportedModelError(
            f"{kind}: it needs a cache of its own class ({reason}), which is not supported"
        )
    return OwnAttentionError(
        f"{kind}: its forward needs the length of the cache as one number, but sequences of a "
        f"batch differ in length ({reason}), which is not supported"
    )
