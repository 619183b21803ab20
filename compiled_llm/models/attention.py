"""The first door into a model: an attention function in transformers' public registry.

While a step runs, `CURRENT.attention` says what an attention call does: emit the marker that the passes rewrite, or
(when a model is being examined) write down what was asked for. The function learns nothing from the keyword arguments
that a model may forget to hand on; it reads them only to refuse what it cannot serve.

The function has two names. Under the one that steps use, transformers builds no mask; under the one for examining, masks are built
only to learn how far back they reach (see `masks`), and steps then know that for each call.
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

# Arguments that say nothing which the step's own metadata does not say.
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
        reach: while a model is examined, how far back its mask, or else the call, lets queries see (see `AttentionLayer.window`).
        softcap: scores become `softcap * tanh(scores / softcap)`; 0 for none.
        sinks: [H] a score for each head that takes weight and gives no value, or None.
        slopes: [H] float32, what each head's scores lose for each token that lies between query and key (ALiBi), or None.
        is_causal: what the call and its module say, where no mask says more.
    """

    scale: float
    reach: AttentionReach = FULL
    softcap: float = 0.0
    sinks: Tensor | None = None
    slopes: Tensor | None = None
    is_causal: bool = True


class Attention(Protocol):
    """What an attention call does. Shapes: q [1, H, T, D], k [1, G, T, D], v [1, G, T, E] -> [1, T, H, E]."""

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> Tensor: ...


class Current(threading.local):
    """What attention calls of this thread do now: a step sets it on entry and clears it on exit, inside the trace.

    Each engine has a thread of its own, so it is read and written without a lock.
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
    """transformers' attention interface: k and v come after RoPE and before repetition, for the new tokens only."""
    reach = probed_reach(attention_mask)
    if attention_mask is not None and reach is None:
        raise UnsupportedModelError(
            "attention with an explicit attention_mask is not supported: only causal masks and windows are"
        )
    if dropout:
        raise UnsupportedModelError(
            f"attention dropout of {dropout} is not supported: put the model in eval mode"
        )
    for name, given in kwargs.items():
        if given is not None and name not in _REDUNDANT:
            raise UnsupportedModelError(f"attention argument {name!r} is not supported")
    if CURRENT.attention is None:
        raise RuntimeError(
            "this model's attention belongs to a CompiledLLM: call it through that, or set_attn_implementation"
        )
    call = AttentionCall(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        reach=AttentionReach.decode(sliding_window or 0) if reach is None else reach,
        softcap=softcap or 0.0,
        sinks=s_aux,
        is_causal=reach is not None
        or (is_causal is not False and getattr(module, "is_causal", True) is not False),
    )
    return CURRENT.attention(module, query, key, value, call), None


# No mask function is registered under the first name, so transformers builds no mask at all.
AttentionInterface.register(ATTENTION_NAME, attention_forward)
AttentionInterface.register(MASK_PROBE_NAME, attention_forward)


class LayerCache(nn.Module):
    """The paged keys [P, B, G, D] and values [P, B, G, E] of one attention call, as buffers: their addresses never change."""

    k: Tensor
    v: Tensor

    def __init__(self, k: Tensor, v: Tensor) -> None:
        super().__init__()
        self.register_buffer("k", k, persistent=False)
        self.register_buffer("v", v, persistent=False)


@dataclass(kw_only=True)
class PagedAttention:
    """Attention over the paged caches, for the tokens of one step; the caches go to the calls in their order.

    Attributes:
        groups: for each call the group whose pages it uses; the group's number indexes `slots` and `block_tables`.
        windows: for each call how far back its queries see, as in `passes.ops.paged_attention`.
        slots: [G, T] int64, where each token's key and value go.
        block_tables: [G, S, N] int32, query_start: [S + 1] int32, seq_lens: [S] int32, split_counters: int32, as in
            `passes.ops.paged_attention`.
        max_query_len: the most queries a sequence brings; 1 in decode.
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
        if q.shape[0] > 1:  # a row for each token
            q, k, v = (tensor.permute(2, 1, 0, 3) for tensor in (q, k, v))
            return self(module, q, k, v, call).transpose(0, 1)
        layer, cache, group = self.calls, self.caches[self.calls], self.groups[self.calls]
        self.calls += 1
        attended: Tensor = torch.ops.compiled_llm.attention_marker(
            q, k, v, cache.k, cache.v, self.slots[group], self.block_tables[group], self.query_start, self.seq_lens,
            self.split_counters, call.sinks, call.slopes, layer, call.scale, self.windows[layer], call.softcap, self.max_query_len,
        )  # fmt: skip
        return attended
