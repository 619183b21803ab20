"""The marker: what one attention call of a model becomes in the traced graph, until a pass replaces it.

It names everything that paged attention needs (tensors as the model made them, the layer's caches, the step's
metadata, and the call's options), so that a pass rewrites it without knowing the model. Its schema is functional,
which keeps it out of functionalisation's way.

Shapes: T tokens, H query heads, G key/value heads, D key head dim, E value head dim; the rest as in `paged_attention`.
The batch dim of 1 is the model's: all of a step's tokens travel as one row.
"""

from torch import Tensor

from passes.ops.library import define_op
from passes.ops.paged_attention import paged_attention, paged_attention_reference
from passes.ops.write_kv import write_kv


def attention_marker_reference(
    q_1HTD: Tensor, k_1GTD: Tensor, v_1GTE: Tensor, k_cache: Tensor, v_cache: Tensor, slots_T: Tensor, block_table_SN: Tensor,
    query_start: Tensor, seq_lens_S: Tensor, split_counters: Tensor, sinks_H: Tensor | None, slopes_H: Tensor | None, layer: int,
    scale: float, window: int, softcap: float, max_query_len: int,
) -> Tensor:  # fmt: skip
    """Write, then attend: what the pass emits, run at once. Returns [1, T, H, E].

    It writes to the caches although the schema does not say so. That is sound only because each cache belongs to one
    marker and nothing else in a step touches it.
    """
    write_kv(k_1GTD[0].transpose(0, 1), v_1GTE[0].transpose(0, 1), k_cache, v_cache, slots_T)
    attend = (
        paged_attention if q_1HTD.is_cuda else paged_attention_reference
    )  # on a CPU, eager steps wait for no compiler
    attended: Tensor = attend(
        q_1HTD[0].transpose(0, 1), k_cache, v_cache, block_table_SN, query_start, seq_lens_S,
        split_counters, sinks_H, slopes_H, scale, window, softcap, max_query_len,
    )  # fmt: skip
    return attended[None]


def _attention_marker_fake(q_1HTD: Tensor, k: Tensor, v_1GTE: Tensor, *_: object) -> Tensor:
    return q_1HTD.new_empty(1, q_1HTD.shape[2], q_1HTD.shape[1], v_1GTE.shape[-1])


attention_marker = define_op(
    "attention_marker(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor slots, Tensor block_table, "
    "Tensor query_start, Tensor seq_lens, Tensor split_counters, Tensor? sinks, Tensor? slopes, int layer, float scale, int window, "
    "float softcap, int max_query_len) -> Tensor",
    reference=attention_marker_reference,
    kernel=attention_marker_reference,
    fake=_attention_marker_fake,
)
