"""Attention marker -> write of the keys and values to their slots, then paged attention.

Matches: every `attention_marker`, one for each attention call of the model.
Emits: `index_put_`, which mutates the layer's caches (graph inputs) and which Inductor fuses with what makes the keys and values,
and `paged_attention`; Inductor keeps their order because the second reads what the first mutates.
Assumes: a functionalised graph, in which no other node touches the caches.
"""

import torch
from torch.fx import Graph, Node

from passes.fx_utils import insert_call
from passes.ops.attention_marker import attention_marker
from passes.ops.paged_attention import paged_attention
from passes.pipeline import GraphPass, PassContext

aten = torch.ops.aten


def _run(graph: Graph, context: PassContext) -> list[str]:
    markers = graph.find_nodes(op="call_function", target=attention_marker)
    places: dict[object, list[Node]] = {}
    return [context.layers[_rewrite(graph, marker, places)] for marker in markers]


def _rewrite(graph: Graph, marker: Node, all_places: dict[object, list[Node]]) -> int:
    (
        q,
        k,
        v,
        k_cache,
        v_cache,
        slots,
        block_table,
        query_start,
        seq_lens,
        split_counters,
        sinks,
        slopes,
        layer,
        *options,
    ) = marker.args
    assert isinstance(layer, int)
    assert isinstance(k_cache, Node)
    assert isinstance(slots, Node)
    with graph.inserting_before(marker):
        q, k, v = (_tokens_first(graph, heads_first) for heads_first in (q, k, v))
        size = k_cache.meta["val"].shape[1]
        key = (slots.target, slots.args, size)  # each layer selects its group's slots anew
        if key not in all_places:
            all_places[key] = _places(graph, slots, size)
        for cache, values in ((k_cache, k), (v_cache, v)):
            # A scatter, which Inductor fuses with what makes the values.
            insert_call(graph, aten.index_put_.default, cache, all_places[key], values)
        tables = (block_table, query_start, seq_lens, split_counters)
        attended = insert_call(
            graph, paged_attention, q, k_cache, v_cache, *tables, sinks, slopes, *options
        )
        marker.replace_all_uses_with(insert_call(graph, aten.unsqueeze.default, attended, 0))
    graph.erase_node(marker)
    return layer


def _places(graph: Graph, slots: Node, size: int) -> list[Node]:
    """Page and offset of each slot in a cache [P, size, G, D]; the size is a power of two."""
    shift = size.bit_length() - 1
    return [
        insert_call(graph, aten.bitwise_right_shift.Tensor_Scalar, slots, shift),
        insert_call(graph, aten.bitwise_and.Scalar, slots, size - 1),
    ]


def _tokens_first(graph: Graph, heads_first: object) -> Node:
    """[1, H, T, D] -> [T, H, D], a view."""
    assert isinstance(heads_first, Node)
    return insert_call(
        graph,
        aten.permute.default,
        insert_call(graph, aten.select.int, heads_first, 0, 0),
        [1, 0, 2],
    )


LOWER_ATTENTION_MARKER = GraphPass(
    name="lower_attention_marker", run=_run, expected=lambda context: list(context.layers)
)
