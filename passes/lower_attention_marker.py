"""Lower each attention marker to a KV cache update and paged attention.

Before, for one attention call (T tokens, H query heads, G key/value heads, pages of B tokens)::

    out = attention_marker(q [1, H, T, D], k [1, G, T, D], v [1, G, T, E], k_cache, v_cache,
                           slots, block_table, ..., layer, scale, window, softcap, max_query_len)

After::

    page, offset = slots >> log2(B), slots & (B - 1)     # shared by layers with equal slots
    index_put_(k_cache, [page, offset], k[0].permute(1, 0, 2))
    index_put_(v_cache, [page, offset], v[0].permute(1, 0, 2))
    out = paged_attention(q[0].permute(1, 0, 2), k_cache, v_cache, block_table, ...)[None]

Matches: every `attention_marker`. One match is expected for each layer of `AttentionLayers`.

Emits: `index_put_`, a scatter that Inductor fuses with the kernels that compute keys and values,
and `paged_attention`. Inductor keeps their order, because the op reads what the scatter mutates.

Assumes: a functionalized graph in which no other node accesses the caches, which are graph inputs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from passes.fx_utils import insert_call
from passes.ops.attention_marker import attention_marker
from passes.ops.paged_attention import paged_attention
from passes.pipeline import GraphPass, PassContext

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class AttentionLayers:
    """The attention calls of a model.

    Attributes:
        names: qualified name of the calling module of each attention call, in call order. The
            `layer` argument of a marker is an index into it.
    """

    names: tuple[str, ...] = ()


# Page and offset of each slot, by the node that computes the slots and the size of a page.
_SlotIndices = dict[tuple[object, ...], list[Node]]


def _run(graph: Graph, context: PassContext) -> list[str]:
    names = context.get(AttentionLayers).names
    markers = graph.find_nodes(op="call_function", target=attention_marker)
    indices: _SlotIndices = {}
    return [names[_lower(graph, marker, indices)] for marker in markers]


def _lower(graph: Graph, marker: Node, indices: _SlotIndices) -> int:
    """Replace a marker; return its `layer` argument."""
    arguments = _arguments(marker)
    with graph.inserting_before(marker):
        q, k, v = (_tokens_first(graph, arguments[name]) for name in ("q", "k", "v"))
        index = _slot_index(graph, arguments["slots"], arguments["k_cache"], indices)
        insert_call(graph, aten.index_put_.default, arguments["k_cache"], index, k)
        insert_call(graph, aten.index_put_.default, arguments["v_cache"], index, v)
        rest = [arguments[name] for name in _PAGED_ATTENTION_ARGUMENTS[1:]]
        attended = insert_call(graph, paged_attention, q, *rest)
        marker.replace_all_uses_with(insert_call(graph, aten.unsqueeze.default, attended, 0))
    graph.erase_node(marker)
    layer: int = arguments["layer"]
    return layer


def _arguments(marker: Node) -> dict[str, Any]:
    """Return the marker's arguments by the names in its schema."""
    names = (argument.name for argument in attention_marker._schema.arguments)
    return dict(zip(names, marker.args, strict=True))


_PAGED_ATTENTION_ARGUMENTS = [argument.name for argument in paged_attention._schema.arguments]


def _slot_index(graph: Graph, slots: Node, k_cache: Node, indices: _SlotIndices) -> list[Node]:
    """Return page and offset [T] of each slot [T]; reuse those of an equal `slots` node."""
    page_size = k_cache.meta["val"].shape[1]
    # Each layer selects the slots of its KV cache group by a node of its own.
    key = (slots.target, slots.args, page_size)
    if key not in indices:
        shift = page_size.bit_length() - 1  # the size of a page is a power of two
        indices[key] = [
            insert_call(graph, aten.bitwise_right_shift.Tensor_Scalar, slots, shift),
            insert_call(graph, aten.bitwise_and.Scalar, slots, page_size - 1),
        ]
    return indices[key]


def _tokens_first(graph: Graph, heads_first: Node) -> Node:
    """Return a view [T, H, D] of a node [1, H, T, D]."""
    row = insert_call(graph, aten.select.int, heads_first, 0, 0)
    return insert_call(graph, aten.permute.default, row, [1, 0, 2])


def _expected(context: PassContext) -> list[str]:
    return list(context.get(AttentionLayers).names)


LOWER_ATTENTION_MARKER = GraphPass(name="lower_attention_marker", run=_run, expected=_expected)
