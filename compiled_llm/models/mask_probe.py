"""What a model masks, found by asking its mask functions about single pairs of tokens while it is examined.

Some models hand a window to the attention call, others only build it into a mask. transformers builds masks through a public
registry, from functions of a query's and a key's index; here they are evaluated on a few queries around every edge, so that a mask
is a causal one, a window or chunks because it answers like one, and anything else is refused.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import AttentionMaskInterface

from passes.attention_reach import FULL, AttentionReach

# The registered name of attention that examines; outside of that no mask function is registered, and no mask is built.
MASK_PROBE_NAME = "compiled_llm_examining"

_FULL = 300  # keys looked at where nothing says how far back a mask reaches
_NOTES = "_compiled_llm_reach"


def probed_reach(mask: Tensor | None) -> AttentionReach | None:
    """How far back a mask made here lets queries see, as in `AttentionLayer.window`; None where it says nothing of that."""
    return getattr(mask, _NOTES, None)


def _note_mask(
    *,
    mask_function: Callable[..., Tensor],
    q_length: int,
    device: torch.device,
    local_size: int | None = None,
    **_: object,
) -> Tensor | None:
    """Stands for a mask: a tensor that knows its reach, or that is a mask like any other where it has none that is served."""
    stand_in = torch.zeros(1, 1, 1, 1, device=device)
    device = torch.device("cpu") if device.type == "meta" else device
    size = local_size or _FULL // 3
    edges = sorted({0, 1, size - 1, size, size + 1, 2 * size, 3 * size - 1})
    reaches = [FULL]
    if local_size:
        reaches += [AttentionReach.sliding(local_size), AttentionReach.chunked(local_size)]
    try:
        matching = [
            reach
            for reach in reaches
            if _answers_like(mask_function, reach, edges, 3 * size + 1, device)
        ]
    except IndexError:  # it looks up what kind of token each of the row is; they are all text, like all that will come
        alike = _answers_like(mask_function, FULL, range(q_length), q_length, device)
        matching = [AttentionReach.decode(local_size or 0)] if alike and q_length > 1 else []
    if matching:
        setattr(stand_in, _NOTES, matching[0])
    return stand_in


def _answers_like(
    mask_function: Callable[..., Tensor],
    reach: AttentionReach,
    queries: Iterable[int],
    num_keys: int,
    device: torch.device,
) -> bool:
    """Whether these queries see of the first keys what those of this reach do."""
    zero, keys = (
        torch.zeros((), dtype=torch.int64, device=device),
        torch.arange(num_keys, device=device),
    )
    for query in queries:
        seen = mask_function(zero, zero, torch.tensor(query, device=device), keys)
        if not torch.equal(
            seen.expand_as(keys), (keys <= query) & (keys >= reach.first_visible(query))
        ):
            return False
    return True


AttentionMaskInterface.register(MASK_PROBE_NAME, _note_mask)
