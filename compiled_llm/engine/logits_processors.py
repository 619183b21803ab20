"""Logits processors of a request, which run outside the graph."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compiled_llm.engine.request import Request


def apply_logits_processors(
    request: Request, tokens: NDArray[np.integer], logits: Tensor
) -> Tensor:
    """Return the logits as the request's processors change them, [1, V].

    Args:
        request: the request.
        tokens: [T], token ids of the prompt and the completion so far.
        logits: [1, V] float32.

    Raises:
        ValueError: a processor returned something other than logits of this shape.
        Exception: whatever a processor raised.
    """
    ids = torch.from_numpy(tokens.astype(np.int64))[None].to(logits.device)
    for processor in request.sampling_params.logits_processors:
        changed: Any = processor(ids, logits)  # type: ignore[arg-type]
        if not isinstance(changed, Tensor) or changed.shape != logits.shape:
            got = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
            raise ValueError(
                f"a logits processor must return logits of shape {tuple(logits.shape)}, got {got}"
            )
        logits = changed.to(logits)
    return logits
