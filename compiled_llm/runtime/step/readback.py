"""Copies of what steps sampled to the host, on a stream of their own while the next steps run."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compiled_llm.runtime.step.buffers import RING_SIZE, StepBuffers


@dataclass(frozen=True, slots=True)
class StepHandle:
    """Number of a launched step. Its outputs can be read until `RING_SIZE` more steps run."""

    step: int


class Logprobs(NamedTuple):
    """Logprobs and token ids as `passes.ops.top_logprobs` returns them.

    values [..., 1 + M] float32: of the sampled token, then the top ones.
    ids [..., 1 + M] int64: the rank of the sampled token, then the ids of the top ones.
    """

    values: NDArray[np.float32]
    ids: NDArray[np.int64]


class Readback:
    """Reads the output rings of `StepBuffers`.

    The device and the host each count the launched steps, from the first one on.

    Shapes: R rows; M top logprobs.
    """

    def __init__(self, state: StepBuffers) -> None:
        self._state = state
        state.step.zero_()
        self._launched = 0
        self._cuda = state.tokens.device.type == "cuda"
        if self._cuda:
            self._stream = torch.cuda.Stream(state.tokens.device)
            self._launch_done = [torch.cuda.Event() for _ in range(RING_SIZE)]
            self._copy_done = [torch.cuda.Event() for _ in range(RING_SIZE)]
            self._pinned = torch.zeros_like(state.ring_tokens, device="cpu").pin_memory()

    def start(self) -> StepHandle:
        """Start the copy of the tokens of the step that was just launched."""
        handle = StepHandle(self._launched)
        self._launched += 1
        if self._cuda:
            slot = handle.step % RING_SIZE
            self._launch_done[slot].record()
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(self._launch_done[slot])
                self._pinned[slot].copy_(self._state.ring_tokens[slot], non_blocking=True)
                self._copy_done[slot].record(self._stream)
        return handle

    def resynchronize(self) -> None:
        """Set the host's count to the device's, which waits for it. Earlier handles are invalid."""
        self._launched = int(self._state.step)

    def tokens(self, handle: StepHandle) -> NDArray[np.int64]:
        """Return the sampled tokens [R + 1] int64, -1 for non-finite logits; waits for the step."""
        slot = self._slot(handle)
        if not self._cuda:
            return self._state.ring_tokens[slot].numpy().copy()
        self._copy_done[slot].synchronize()
        return self._pinned[slot].numpy().copy()

    def logprobs(self, handle: StepHandle) -> Logprobs:
        """Return the logprobs [R + 1, 1 + M] of the rows; waits for the step."""
        slot = self._slot(handle)
        values = self._fetch(self._state.ring_logprobs[slot], slot)
        return Logprobs(values, self._fetch(self._state.ring_logprob_ids[slot], slot))

    def _slot(self, handle: StepHandle) -> int:
        assert self._launched - RING_SIZE <= handle.step < self._launched, (
            f"the outputs of {handle} were overwritten: {self._launched} steps have been launched"
        )
        return handle.step % RING_SIZE

    def _fetch(self, ring: Tensor, slot: int) -> NDArray[Any]:
        if not self._cuda:
            return ring.numpy().copy()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._launch_done[slot])
            fetched = ring.cpu()
        return fetched.numpy()
