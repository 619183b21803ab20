"""The attention function that models call while an engine uses them.

It is registered with transformers' public attention interface. `CURRENT.attention` holds what a
call does: emit the marker op that the passes lower, or record the call while the model is examined.
Of the keyword arguments, which a model may fail to pass on, the function uses only what it needs to
reject unsupported calls.

The function has two names. Under the first, used in steps, transformers builds no mask. Under the
second, used to examine a model, masks are built so that their reach is known (see `mask_probe`).
"""

import threading
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

import passes.ops.attention_marker  # noqa: F401  # registers the op
from compiled_llm.errors import UnsupportedModelError
from compiled_llm.models.mask_probe import MASK_PROBE_NAME, probed_reach
from passes.attention_reach import FULL, AttentionReach

ATTENTION_NAME = "compiled_llm"

# Arguments with information that a step has anyway.
_REDUNDANT = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "logits_to_keep",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """The options of one attention call.

    Attributes:
        scale: factor of q k^T.
        reach: the keys that a query sees, according to the mask or, without one, to the call's
            arguments. Read only while a model is examined.
        softcap: scores become `softcap * tanh(scores / softcap)`; 0 for none.
        sinks: [H] a score per head that takes part in the softmax and has no value, or None.
        slopes: [H] float32, the decrease of each head's scores per token of distance between query
            and key (ALiBi, arXiv:2108.12409), or None.
        is_causal: whether the call is causal, according to its mask, its arguments or its module.
    """

    scale: float
    reach: AttentionReach = FULL
    softcap: float = 0.0
    sinks: Tensor | None = None
    slopes: Tensor | None = None
    is_causal: bool = True


class Attention(Protocol):
    """An implementation: q [1, H, T, D], k [1, G, T, D], v [1, G, T, E] -> [1, T, H, E]."""

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> Tensor: ...


class Current(threading.local):
    """The implementation that attention calls of this thread use.

    A step sets it when it starts and clears it when it ends, inside the trace. Each engine has a
    thread of its own, so no lock is needed.
    """

    attention: Attention | None = None


CURRENT = Current()


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Implement transformers' attention interface.

    Args:
        module: the module that calls.
        query: [1, H, T, D], after the rotary embedding.
        key: [1, G, T, D], of the new tokens alone, after the rotary embedding and not repeated for
            the heads that share it.
        value: [1, G, T, E], of the new tokens alone.
        attention_mask: None, or a placeholder made by `mask_probe`.
        scaling: factor of q k^T; D^-0.5 by default.
        dropout: must be 0.
        sliding_window: size of the window, without a mask.
        softcap: see `AttentionCall`.
        s_aux: [H] sink scores.
        is_causal: whether the attention is causal, without a mask.
        **kwargs: arguments that have no effect or are None.

    Returns:
        [1, T, H, E], and None in place of the attention weights.

    Raises:
        UnsupportedModelError: an argument requests another kind of attention.
        RuntimeError: no engine runs a step of the model.
    """
    reach = probed_reach(attention_mask)
    if attention_mask is not None and reach is None:
        raise UnsupportedModelError(
            "attention with an explicit attention_mask is not supported: only causal masks and "
            "windows are"
        )
    _check_arguments(dropout, kwargs)
    if CURRENT.attention is None:
        raise RuntimeError(
            "this model's attention belongs to a CompiledLLM: call the model through that, or "
            "select another implementation with set_attn_implementation"
        )
    is_declared_causal = is_causal is not False and getattr(module, "is_causal", True) is not False
    call = AttentionCall(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        reach=AttentionReach.decode(sliding_window or 0) if reach is None else reach,
        softcap=softcap or 0.0,
        sinks=s_aux,
        is_causal=reach is not None or is_declared_causal,
    )
    return CURRENT.attention(module, query, key, value, call), None


def _check_arguments(dropout: float, others: dict[str, object]) -> None:
    if dropout:
        raise UnsupportedModelError(
            f"attention dropout of {dropout} is not supported: put the model in eval mode"
        )
    for name, given in others.items():
        if given is not None and name not in _REDUNDANT:
            raise UnsupportedModelError(f"attention argument {name!r} is not supported")


# No mask function is registered under the first name, so transformers builds no mask for it.
AttentionInterface.register(ATTENTION_NAME, attention_forward)
AttentionInterface.register(MASK_PROBE_NAME, attention_forward)


class LayerCache(nn.Module):
    """The paged KV cache of one attention layer.

    Keys [P, B, G, D] and values [P, B, G, E] of P blocks of B tokens are buffers, so that their
    addresses stay the same.
    """

    k: Tensor
    v: Tensor

    def __init__(self, k: Tensor, v: Tensor) -> None:
        super().__init__()
        self.register_buffer("k", k, persistent=False)
        self.register_buffer("v", v, persistent=False)


@dataclass(kw_only=True)
class PagedAttention:
    """Attention over the paged caches for the tokens of one step.

    The n-th attention call of a step uses the n-th cache.

    Attributes:
        caches: a `LayerCache` for each call.
        groups: for each call the KV cache group, an index into `slots` and `block_tables`.
        windows: for each call its encoded reach (see `AttentionReach.encode`).
        slots: [G, T] int64, where each token's key and value are written.
        block_tables: [G, S, N] int32, as in `passes.ops.paged_attention`.
        query_start: [S + 1] int32, likewise.
        seq_lens: [S] int32, likewise.
        split_counters: int32, likewise.
        max_query_len: the most queries of a sequence; 1 in decode.
    """

    caches: nn.ModuleList
    groups: tuple[int, ...]
    windows: tuple[int, ...]
    slots: Tensor
    block_tables: Tensor
    query_start: Tensor
    seq_lens: Tensor
    split_counters: Tensor
    max_query_len: int
    calls: int = field(default=0, init=False)

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> Tensor:
        """Return [1, T, H, E]; or [T, 1, H, E] where each token is a row, as in [T, H, 1, D]."""
        if q.shape[0] > 1:
            q, k, v = (tensor.permute(2, 1, 0, 3) for tensor in (q, k, v))
            return self(module, q, k, v, call).transpose(0, 1)
        layer = self.calls
        cache, group = self.caches[layer], self.groups[layer]
        self.calls += 1
        attended: Tensor = torch.ops.compiled_llm.attention_marker(
            q, k, v, cache.k, cache.v, self.slots[group], self.block_tables[group],
            self.query_start, self.seq_lens, self.split_counters, call.sinks, call.slopes, layer,
            call.scale, self.windows[layer], call.softcap, self.max_query_len,
        )  # fmt: skip
        return attended
