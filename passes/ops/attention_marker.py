"""The marker op: one attention call of a model in the traced graph, until a pass lowers it.

Its arguments are all that paged attention depends on: the tensors as the model computed them, the
layer's caches, the step's metadata and the call's options. `passes.lower_attention_marker` can
thus rewrite it without knowledge of the model. The schema is functional, so that functionalization
leaves it as it is.

Shape suffixes as in `passes.ops.paged_attention`. The leading 1 is the model's batch dimension:
all tokens of a step form one row.
"""

from torch import Tensor

from passes.ops.library import define_op
from passes.ops.paged_attention import paged_attention, paged_attention_reference
from passes.ops.write_kv import write_kv


def attention_marker_reference(
    q_1HTD: Tensor, k_1GTD: Tensor, v_1GTE: Tensor, k_cache: Tensor, v_cache: Tensor,
    slots_T: Tensor, block_table_SN: Tensor, query_start: Tensor, seq_lens_S: Tensor,
    split_counters: Tensor, sinks_H: Tensor | None, slopes_H: Tensor | None, layer: int,
    scale: float, window: int, softcap: float, max_query_len: int,
) -> Tensor:  # fmt: skip
    """Write keys and values to the caches and attend; return [1, T, H, E].

    The caches are mutated although the schema does not declare it. This is sound because each
    cache belongs to one marker and no other op of a step accesses it.

    Args:
        slots_T: int64 slots as in `passes.ops.write_kv`.
        layer: index of the attention call in the model.
        others: as in `passes.ops.paged_attention`.
    """
    write_kv(k_1GTD[0].transpose(0, 1), v_1GTE[0].transpose(0, 1), k_cache, v_cache, slots_T)
    # On a CPU the op would compile C++; eager steps use the reference instead.
    attend = paged_attention if q_1HTD.is_cuda else paged_attention_reference
    attended: Tensor = attend(
        q_1HTD[0].transpose(0, 1), k_cache, v_cache, block_table_SN, query_start, seq_lens_S,
        split_counters, sinks_H, slopes_H, scale, window, softcap, max_query_len,
    )  # fmt: skip
    return attended[None]


def _attention_marker_fake(q_1HTD: Tensor, k: Tensor, v_1GTE: Tensor, *_: object) -> Tensor:
    return q_1HTD.new_empty(1, q_1HTD.shape[2], q_1HTD.shape[1], v_1GTE.shape[-1])


attention_marker = define_op(
    "attention_marker(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, "
    "Tensor slots, Tensor block_table, Tensor query_start, Tensor seq_lens, "
    "Tensor split_counters, Tensor? sinks, Tensor? slopes, int layer, float scale, int window, "
    "float softcap, int max_query_len) -> Tensor",
    reference=attention_marker_reference,
    kernel=attention_marker_reference,
    fake=_attention_marker_fake,
)
