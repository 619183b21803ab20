"""Sampling parameters of a request in the form that the sampler in the graph reads.

Shapes: V token ids that the model generates, C packed sampling parameters (see `SamplingTensors`).
"""

import numpy as np
from numpy.typing import NDArray

from compiled_llm.engine.request import Request
from compiled_llm.runtime.step.sampler import SamplingTensors
from compiled_llm.runtime.step.sampler_state import SamplerState


def pack_sampling_params(request: Request) -> NDArray[np.int64]:
    """Return the parameters that every row of the batch has, [C]."""
    params = request.sampling_params
    return SamplingTensors.pack(
        seed=request.seed,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logprobs=-1 if params.logprobs is None else params.logprobs,
        biased=_is_biased(request),
        counted=_is_counted(request),
        bad_words=any(len(word) > 1 for word in request.bad_words),
        host_sampled=bool(params.logits_processors),
    )


def make_sampler_state(request: Request, vocab_size: int) -> SamplerState:
    """Return the tensors that only the full sampler reads.

    Token counts include the tokens that the request has generated before it was preempted.
    """
    long_words = [word for word in request.bad_words if len(word) > 1]
    return SamplerState(
        bias=make_bias(request, vocab_size) if _is_biased(request) else None,
        counts=_count_tokens(request, vocab_size) if _is_counted(request) else None,
        bad_words=long_words or None,
    )


def make_bias(
    request: Request, vocab_size: int, *, min_tokens_reached: bool = False
) -> NDArray[np.float32]:
    """Return what is added to the logits, [V].

    Args:
        request: the request.
        vocab_size: V.
        min_tokens_reached: leave out the ban of stop tokens; without it, `request.token_ids`
            decides, which is current only while the request has no row.
    """
    params = request.sampling_params
    bias = np.zeros(vocab_size, np.float32)
    if params.allowed_token_ids is not None:
        bias[:] = -np.inf
        bias[list(params.allowed_token_ids)] = 0
    for token, value in (params.logit_bias or {}).items():
        bias[token] += value
    bias[[word[0] for word in request.bad_words if len(word) == 1]] = -np.inf
    if not min_tokens_reached and len(request.token_ids) < params.min_tokens:
        bias[[token for token in request.stop_token_ids if token < vocab_size]] = -np.inf
    return bias


def _is_biased(request: Request) -> bool:
    params = request.sampling_params
    single = any(len(word) == 1 for word in request.bad_words)
    return bool(params.logit_bias or params.allowed_token_ids or params.min_tokens or single)


def _is_counted(request: Request) -> bool:
    params = request.sampling_params
    additive = params.presence_penalty or params.frequency_penalty
    return bool(additive or params.repetition_penalty != 1)


def _count_tokens(request: Request, vocab_size: int) -> NDArray[np.int32]:
    generated = np.asarray(request.token_ids, np.int64)
    counts = 2 * np.bincount(generated, minlength=vocab_size).astype(np.int32)
    prompt = np.asarray(request.prompt_token_ids, np.int64)
    # A prompt may hold ids that the model embeds but does not generate.
    counts[prompt[prompt < vocab_size]] += 1
    return counts
