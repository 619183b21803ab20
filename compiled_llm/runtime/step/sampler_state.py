"""What few rows bring to the full sampler, and so is written apart from what all rows have."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from compiled_llm.runtime.step.buffers import StepBuffers
from compiled_llm.runtime.step.sampler import MAX_BAD_WORD_LEN, MAX_BAD_WORDS


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerState:
    """What a row brings; None where it brings nothing of the kind.

    Attributes:
        bias: [V] float32, added to the logits.
        counts: [V] int32, 2 * times generated + whether in the prompt.
        bad_words: token sequences that must not be completed.
    """

    bias: NDArray[np.float32] | None = None
    counts: NDArray[np.int32] | None = None
    bad_words: list[list[int]] | None = None

    def write(self, state: StepBuffers, row: int) -> None:
        """To the row; its params must say what counts (see `sampling.SamplingTensors`)."""
        if self.bias is not None:
            state.bias[row].copy_(torch.from_numpy(self.bias))
        if self.counts is not None:
            state.counts[row].copy_(torch.from_numpy(self.counts))
        if self.bad_words is not None:
            words = np.full((MAX_BAD_WORDS, MAX_BAD_WORD_LEN), -1, np.int64)
            for number, tokens in enumerate(self.bad_words):
                words[number, -len(tokens) :] = tokens
            state.bad_words[row].copy_(torch.from_numpy(words))
