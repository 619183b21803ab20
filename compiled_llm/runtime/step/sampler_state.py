"""Inputs of the `full` sampler that few rows have, written apart from those that all rows have."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from compiled_llm.runtime.step.buffers import StepBuffers
from compiled_llm.runtime.step.sampler import MAX_BAD_WORD_LEN, MAX_BAD_WORDS


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerState:
    """Bias, token counts and bad words of one row; None leaves a buffer as it is.

    A field takes effect only with the flag of the same name in the row's parameters (see
    `SamplingTensors.pack`).

    Attributes:
        bias: [V] float32, added to the logits.
        counts: [V] int32, 2 * times generated + (1 if in the prompt).
        bad_words: token sequences that must not be completed, at most `MAX_BAD_WORDS` of at most
            `MAX_BAD_WORD_LEN` tokens each.
    """

    bias: NDArray[np.float32] | None = None
    counts: NDArray[np.int32] | None = None
    bad_words: list[list[int]] | None = None

    def write(self, state: StepBuffers, row: int) -> None:
        """Copy the fields that are not None to the row's buffers."""
        if self.bias is not None:
            state.bias[row].copy_(torch.from_numpy(self.bias))
        if self.counts is not None:
            state.counts[row].copy_(torch.from_numpy(self.counts))
        if self.bad_words is not None:
            words = np.full((MAX_BAD_WORDS, MAX_BAD_WORD_LEN), -1, np.int64)
            for number, tokens in enumerate(self.bad_words):
                words[number, -len(tokens) :] = tokens
            state.bad_words[row].copy_(torch.from_numpy(words))
