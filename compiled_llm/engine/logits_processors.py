"""A request's own logits processors, which run outside the graph."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compiled_llm.engine.request import Request


def processed(request: Request, tokens: NDArray[np.integer], logits: Tensor) -> Tensor:
    """The logits [1, V] as the processors change them; raises what they raise, and ValueError for what is no logits.

    Args:
        tokens: [T], of the prompt and the completion so far.
    """
    ids = torch.from_numpy(tokens.astype(np.int64))[None].to(logits.device)
    for processor in request.params.logits_processors:
        changed: Any = processor(ids, logits)  # type: ignore[arg-type]
        if not isinstance(changed, Tensor) or changed.shape != logits.shape:
            got = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
            raise ValueError(
                f"a logits processor must return logits of shape {tuple(logits.shape)}, got {got}"
            )
        logits = changed.to(logits)
    return logits
