"""What steps sampled, on its way to the host: a stream of its own copies it while the next steps run."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compiled_llm.runtime.step.buffers import RING_SIZE, StepBuffers


@dataclass(frozen=True, slots=True)
class StepHandle:
    """One launched step, by its number; what it sampled can be read until `RING_SIZE` more steps have been launched."""

    step: int


class Readback:
    """Reads the rings of `StepBuffers`. Steps are counted on the device and here alike, from the first launch on."""

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
        """Begin to fetch the ids of the step just launched."""
        ticket = StepHandle(self._launched)
        self._launched += 1
        if self._cuda:
            slot = ticket.step % RING_SIZE
            self._launch_done[slot].record()
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(self._launch_done[slot])
                self._pinned[slot].copy_(self._state.ring_tokens[slot], non_blocking=True)
                self._copy_done[slot].record(self._stream)
        return ticket

    def resynchronize(self) -> None:
        """Count as many steps as the device has run. No ticket from before may be read any more; waits for the device."""
        self._launched = int(self._state.step)

    def tokens(self, ticket: StepHandle) -> NDArray[np.int64]:
        """[R + 1] int64; waits for the step."""
        slot = self._slot(ticket)
        if not self._cuda:
            return self._state.ring_tokens[slot].numpy().copy()
        self._copy_done[slot].synchronize()
        return self._pinned[slot].numpy().copy()

    def logprobs(self, ticket: StepHandle) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """[R + 1, 1 + M] float32 and int64; waits for the step."""
        slot = self._slot(ticket)
        return self._fetch(self._state.ring_logprobs[slot], slot), self._fetch(
            self._state.ring_logprob_ids[slot], slot
        )

    def _slot(self, ticket: StepHandle) -> int:
        assert self._launched - RING_SIZE <= ticket.step < self._launched, (
            f"{ticket} of {self._launched} steps is gone"
        )
        return ticket.step % RING_SIZE

    def _fetch(self, ring: Tensor, slot: int) -> NDArray[Any]:
        if not self._cuda:
            return ring.numpy().copy()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._launch_done[slot])
            fetched = ring.cpu()
        return fetched.numpy()
