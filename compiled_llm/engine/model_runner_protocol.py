"""Interface of the model runner, as the engine uses it.

Shapes: R rows of the batch and one more, for padding; V token ids that the model generates; T
tokens of a prefill batch; M top logprobs at most.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from compiled_llm.config.schema import Config, Sampler
from compiled_llm.report.report import Report
from compiled_llm.runtime.limits import Limits
from compiled_llm.runtime.memory.kv_cache import KVCacheGroup
from compiled_llm.runtime.step.batch_inputs import DecodeBatch, PrefillBatch
from compiled_llm.runtime.step.readback import Logprobs, StepHandle
from compiled_llm.runtime.step.sampler_state import SamplerState


class StepMemory(Protocol):
    """Dimensions of the paged KV cache."""

    @property
    def groups(self) -> Sequence[KVCacheGroup]:
        """Groups of layers, each with its own blocks."""

    @property
    def block_size(self) -> int:
        """Tokens of a block."""

    @property
    def max_blocks(self) -> int:
        """Blocks of a sequence at most, which is the width of the step's block tables."""


class ModelRunnerProtocol(Protocol):
    """Runs steps on the device. It belongs to the thread that made it."""

    @property
    def config(self) -> Config:
        """Configuration of the engine."""

    @property
    def limits(self) -> Limits:
        """Limits of sequences, tokens of a step and tokens of a sequence."""

    @property
    def report(self) -> Report:
        """Report whose scheduling counters the engine updates."""

    @property
    def memory(self) -> StepMemory:
        """Dimensions of the paged KV cache."""

    @property
    def prefill_sizes(self) -> list[int]:
        """Sizes of the prefill buckets in tokens, in ascending order."""

    @property
    def has_states(self) -> bool:
        """Whether a step with prompt tokens serves a single sequence."""

    @property
    def separate_decode(self) -> bool:
        """Whether steps without prompt tokens are decode batches."""

    @property
    def is_owner(self) -> bool:
        """Whether the current thread and process own the model runner."""

    @property
    def owner_thread(self) -> int:
        """Identifier of the thread that owns the model runner."""

    def check_owner(self) -> None:
        """Raise RuntimeError in any thread or process but the owner."""

    def check_model(self) -> None:
        """Raise RuntimeError if the model has changed since it was compiled."""

    def check_samplers(self, sampler: Sampler, *, scoring: bool) -> None:
        """Raise ValueError if `strict` forbids the steps of a request with this sampler."""

    def maybe_capture(self, *, prompts_pending: bool, steps_in_flight: bool) -> bool:
        """Compile and capture the bucket in most demand, if one is due.

        Args:
            prompts_pending: whether prompts are to be computed; a capture is put off for a while.
            steps_in_flight: whether output of launched steps is still unread or unreported.

        Returns:
            True if a capture is due but `steps_in_flight` prevents it: read their output first.
        """

    def decode(self, batch: DecodeBatch) -> StepHandle:
        """Launch a step of one more token for each row of the batch."""

    def prefill(self, batch: PrefillBatch) -> StepHandle:
        """Launch a step that computes prompt tokens."""

    def write_sampler_state(self, row: int, extras: SamplerState) -> None:
        """Write a row's state of the full sampler."""

    def tokens(self, handle: StepHandle, /) -> NDArray[np.int64]:
        """Return the sampled tokens, [R + 1], -1 if logits were not finite; waits for the step."""

    def logprobs(self, handle: StepHandle, /) -> Logprobs:
        """Return logprobs, [R + 1, 1 + M], of a step of the full sampler; waits for the step."""

    def prompt_logprobs(self, num_tokens: int) -> Logprobs:
        """Return logprobs, [T, 1 + M], of the last prefill step; waits for the step."""

    def logits(self, row: int) -> Tensor:
        """Return the logits of a row's last step, [1, V] float32."""

    def sample_from_logits(self, row: int, logits: Tensor) -> tuple[int, Logprobs]:
        """Sample a row's next token from these logits, [1, V]; -1 if they are not finite."""

    def recover(self) -> None:
        """Prepare for the next step after one was interrupted.

        Raises:
            RuntimeError: the device has failed.
        """
