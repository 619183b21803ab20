"""Find the reach of a model's attention masks by evaluating their mask functions.

Some models pass a window to the attention call, others only build it into a mask. transformers
builds masks through a public registry, from functions of a query's and a key's index. While a model
is examined, such a function is evaluated for a few queries around every edge of a window or chunk.
A mask whose values match causal, sliding or chunked attention is one; any other is unsupported.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import AttentionMaskInterface

from passes.attention_reach import FULL, AttentionReach

# The attention implementation while a model is examined. Only under this name a mask function is
# registered; in steps no mask is built.
MASK_PROBE_NAME = "compiled_llm_examining"

_NUM_KEYS = 300  # keys evaluated for a mask without a local size
_REACH_ATTRIBUTE = "_compiled_llm_reach"


def probed_reach(mask: Tensor | None) -> AttentionReach | None:
    """Return the reach of a mask made under `MASK_PROBE_NAME`; None if it is no supported mask."""
    return getattr(mask, _REACH_ATTRIBUTE, None)


def _probe_mask(
    *,
    mask_function: Callable[..., Tensor],
    q_length: int,
    device: torch.device,
    local_size: int | None = None,
    **_: object,
) -> Tensor:
    """Return a placeholder for a mask, with its reach as an attribute where that is supported."""
    placeholder = torch.zeros(1, 1, 1, 1, device=device)
    device = torch.device("cpu") if device.type == "meta" else device
    size = local_size or _NUM_KEYS // 3
    edges = sorted({0, 1, size - 1, size, size + 1, 2 * size, 3 * size - 1})
    reaches = [FULL]
    if local_size:
        reaches += [AttentionReach.sliding(local_size), AttentionReach.chunked(local_size)]
    try:
        matching = [
            reach
            for reach in reaches
            if _matches(mask_function, reach, edges, 3 * size + 1, device)
        ]
    except IndexError:
        # The function looks up the type of each token of the row. All tokens that an engine serves
        # are text, as those of the row are, so that the row's own positions suffice.
        matches = _matches(mask_function, FULL, range(q_length), q_length, device)
        matching = [AttentionReach.decode(local_size or 0)] if matches and q_length > 1 else []
    if matching:
        setattr(placeholder, _REACH_ATTRIBUTE, matching[0])
    return placeholder


def _matches(
    mask_function: Callable[..., Tensor],
    reach: AttentionReach,
    queries: Iterable[int],
    num_keys: int,
    device: torch.device,
) -> bool:
    """Return whether the mask of these queries, over the first `num_keys` keys, has this reach."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    keys = torch.arange(num_keys, device=device)
    for query in queries:
        visible = mask_function(zero, zero, torch.tensor(query, device=device), keys)
        expected = (keys <= query) & (keys >= reach.first_visible(query))
        if not torch.equal(visible.expand_as(keys), expected):
            return False
    return True


AttentionMaskInterface.register(MASK_PROBE_NAME, _probe_mask)
