"""Reads logits and logprobs of single rows, and samples from logits that the host changed.

Logits processors of a request run on the host, so the tokens of its row are sampled eagerly,
between the steps.

Shape suffixes: V tokens in the vocabulary; M top logprobs.
"""

import torch
from torch import Tensor

from compiled_llm.runtime.step.buffers import StepBuffers
from compiled_llm.runtime.step.readback import Logprobs
from compiled_llm.runtime.step.sampler import SamplingTensors
from compiled_llm.runtime.step.step import sample_and_update
from compiled_llm.sampling_params import MAX_LOGPROBS
from passes.ops.top_logprobs import top_logprobs


def read_logits(state: StepBuffers, row: int) -> Tensor:
    """Return a float32 copy [1, V] of the logits of the row's last step with the `full` sampler."""
    return state.logits[row : row + 1].to(torch.float32, copy=True)


def read_prompt_logprobs(state: StepBuffers, num_tokens: int) -> Logprobs:
    """Return [num_tokens, 1 + M] of the last step, a prefill with the `scoring` sampler; waits."""
    return Logprobs(
        state.prompt_logprobs[:num_tokens].cpu().numpy(),
        state.prompt_logprob_ids[:num_tokens].cpu().numpy(),
    )


@torch.no_grad()
def sample_from_logits(state: StepBuffers, row: int, logits: Tensor) -> tuple[int, Logprobs]:
    """Sample the row's next token from `logits` [1, V] in place of those of its last step.

    Returns:
        The token, -1 if no logit is finite, and its logprobs [1 + M], which are those of the step's
        own logits. Waits for the device.
    """
    rows = torch.tensor([row], device=logits.device)
    params = SamplingTensors.unpack(state.params[rows])
    counted = torch.ones_like(rows).bool()
    sampled = sample_and_update(
        state, logits, rows, state.positions[rows], params, state.recent[rows], counted
    )
    token = sampled.clamp(min=0)
    state.tokens[rows] = token
    values, ids = top_logprobs(state.logits[rows], token, params.logprobs, MAX_LOGPROBS)
    return int(sampled), Logprobs(values.cpu().numpy()[0], ids.cpu().numpy()[0])
