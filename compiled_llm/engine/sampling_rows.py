"""A request's sampling parameters as the sampler in the graph wants them."""

import numpy as np
from numpy.typing import NDArray

from compiled_llm.engine.request import Request
from compiled_llm.runtime.step.sampler import SamplingTensors
from compiled_llm.runtime.step.sampler_state import SamplerState


def pack_params(request: Request) -> NDArray[np.int64]:
    """[C], see `SamplingTensors`."""
    params = request.params
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


def extras_of(request: Request, vocab_size: int) -> SamplerState:
    """What the row needs besides, given what the request has generated so far."""
    long_words = [word for word in request.bad_words if len(word) > 1]
    return SamplerState(
        bias=bias_of(request, vocab_size, may_stop=False) if _is_biased(request) else None,
        counts=_counts(request, vocab_size) if _is_counted(request) else None,
        bad_words=long_words or None,
    )


def bias_of(request: Request, vocab_size: int, *, may_stop: bool) -> NDArray[np.float32]:
    """[V], added to the logits; `may_stop` once there are `min_tokens`."""
    params = request.params
    bias = np.zeros(vocab_size, np.float32)
    if params.allowed_token_ids is not None:
        bias[:] = -np.inf
        bias[list(params.allowed_token_ids)] = 0
    for token, value in (params.logit_bias or {}).items():
        bias[token] += value
    bias[[word[0] for word in request.bad_words if len(word) == 1]] = -np.inf
    if len(request.token_ids) < params.min_tokens and not may_stop:
        bias[[token for token in request.stop_token_ids if token < vocab_size]] = -np.inf
    return bias


def _is_biased(request: Request) -> bool:
    params = request.params
    single = any(len(word) == 1 for word in request.bad_words)
    return bool(params.logit_bias or params.allowed_token_ids or params.min_tokens or single)


def _is_counted(request: Request) -> bool:
    params = request.params
    return bool(
        params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    )


def _counts(request: Request, vocab_size: int) -> NDArray[np.int32]:
    counts = 2 * np.bincount(np.asarray(request.token_ids, np.int64), minlength=vocab_size).astype(
        np.int32
    )
    prompt = np.asarray(request.prompt_token_ids, np.int64)
    counts[prompt[prompt < vocab_size]] += 1  # a prompt may hold ids beyond the output head
    return counts
