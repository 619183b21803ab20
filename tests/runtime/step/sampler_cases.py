"""Requests with all sampling parameters, and what transformers' processors do for them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from compiled_llm.engine.request import Request
from compiled_llm.engine.sampling_metadata import make_sampler_state, pack_sampling_params
from compiled_llm.runtime.step.sampler import (
    MAX_BAD_WORD_LEN,
    MAX_BAD_WORDS,
    LogitsProcessorState,
    SamplingTensors,
)
from compiled_llm.sampling_params import SamplingParams
from tests.conftest import DEVICE

VOCAB = 300
INF = float("inf")
Processor = Callable[[Tensor, Tensor], Tensor]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(
        DEVICE
    )


def some_tokens(count: int, seed: int) -> list[int]:
    """Ids below 100, so that some repeat."""
    return torch.randint(
        3, 100, (count,), generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
    ).tolist()


def request(
    prompt: Sequence[int],
    output: Sequence[int] = (),
    *,
    bad_words: Any = (),
    stops: Any = (),
    **params: Any,
) -> Request:
    wanted = SamplingParams(**{"temperature": 0.0, **params})
    ids = {
        "prompt_token_ids": prompt,
        "token_ids": list(output),
        "bad_words": list(bad_words),
        "stop_token_ids": frozenset(stops),
    }
    return Request(params=wanted, seed=wanted.seed or 0, **ids)


def rows_of(requests: Sequence[Request]) -> tuple[SamplingTensors, LogitsProcessorState]:
    """Return the rows' parameters and state, with other values wherever a request sets nothing."""
    count = len(requests)
    bias = torch.full((count, VOCAB), float("nan"))
    counts = torch.full((count, VOCAB), 7, dtype=torch.int32)
    bad_words = torch.full((count, MAX_BAD_WORDS, MAX_BAD_WORD_LEN), -1)
    bad_words[..., -1] = torch.arange(MAX_BAD_WORDS)
    recent = torch.full((count, MAX_BAD_WORD_LEN - 1), -1)
    for row, wanted in enumerate(requests):
        extras = make_sampler_state(wanted, VOCAB)
        if extras.bias is not None:
            bias[row] = torch.from_numpy(extras.bias)
        if extras.counts is not None:
            counts[row] = torch.from_numpy(extras.counts)
        if extras.bad_words is not None:
            bad_words[row] = -1
            for number, word in enumerate(extras.bad_words):
                bad_words[row, number, -len(word) :] = torch.tensor(word)
        last = [*wanted.prompt_token_ids, *wanted.token_ids][-recent.shape[1] :]
        recent[row, recent.shape[1] - len(last) :] = torch.tensor(last)
    params = SamplingTensors.unpack(
        torch.from_numpy(np.stack([pack_sampling_params(wanted) for wanted in requests])).to(DEVICE)
    )
    return params, LogitsProcessorState(bias, counts, bad_words, recent)


def take(rows: Any, index: Any) -> Any:
    """Select rows of a `SamplingTensors` or a `LogitsProcessorState`."""
    return type(rows)(*(value[index] for value in rows))


def biased(bias: dict[int, float]) -> Processor:
    return SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])


def only(ids: Sequence[int]) -> Processor:
    return SuppressTokensLogitsProcessor([token for token in range(VOCAB) if token not in ids])


def openai_penalties(
    output: Sequence[int], *, presence: float = 0, frequency: float = 0
) -> Processor:
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence.

    c[j] is how often j was generated.
    """

    def penalise(_: Tensor, scores: Tensor) -> Tensor:
        penalised = scores.clone()
        for token in set(output):
            penalised[0, token] -= output.count(token) * frequency + presence
        return penalised

    return penalise


P, O = some_tokens(40, seed=0), some_tokens(40, seed=1)  # noqa: E741
ALL = P + O
EOS = [2, 290]
BIAS = {5: 3.5, 17: -100.0, O[0]: -2.0, 299: 8.0}
NEVER_BEGUN = [[*ALL[-4:-1], 10], [ALL[-1], ALL[-2], 11]]
WORDS = [[O[-1], 7], [*ALL[-7:], 8], [*ALL[-3:], 9], *NEVER_BEGUN, [12], [13], [*ALL[-2:], 7]]
MANY = [[*ALL[-1 - number % 7 :], 100 + number] for number in range(MAX_BAD_WORDS)]
ACROSS = [[P[-2], P[-1], O[0], 9]]
CASES: dict[str, tuple[Request, list[Processor]]] = {
    "nothing": (request(P, O), []),
    "repetition": (request(P, O, repetition_penalty=1.7), [RepetitionPenaltyLogitsProcessor(1.7)]),
    "repetition rewarded": (
        request(P, O, repetition_penalty=0.5),
        [RepetitionPenaltyLogitsProcessor(0.5)],
    ),
    "repetition of the prompt": (
        request(P, repetition_penalty=1.3),
        [RepetitionPenaltyLogitsProcessor(1.3)],
    ),
    "presence": (request(P, O, presence_penalty=1.5), [openai_penalties(O, presence=1.5)]),
    "frequency": (request(P, O, frequency_penalty=-0.7), [openai_penalties(O, frequency=-0.7)]),
    "both": (
        request(P, O, presence_penalty=-2, frequency_penalty=1.1),
        [openai_penalties(O, presence=-2, frequency=1.1)],
    ),
    "both before any output": (request(P, presence_penalty=1.0, frequency_penalty=1.0), []),
    "bias": (request(P, O, logit_bias=BIAS), [biased(BIAS)]),
    "allowed ids": (request(P, O, allowed_token_ids=[5, 60, 299]), [only([5, 60, 299])]),
    "allowed ids and bias": (
        request(P, O, allowed_token_ids=[5, 60], logit_bias=BIAS),
        [biased(BIAS), only([5, 60])],
    ),
    "bad words": (request(P, O, bad_words=WORDS), [NoBadWordsLogitsProcessor(WORDS)]),
    "bad tokens": (
        request(P, O, bad_words=[[5], [299]]),
        [NoBadWordsLogitsProcessor([[5], [299]])],
    ),
    "a bad word across prompt and output": (
        request(P, O[:1], bad_words=ACROSS),
        [NoBadWordsLogitsProcessor(ACROSS)],
    ),
    "bad words longer than the text": (request([9, 4], bad_words=MANY), []),
    "as many bad words as there may be": (
        request(P, O, bad_words=MANY),
        [NoBadWordsLogitsProcessor(MANY)],
    ),
    "min_tokens": (
        request(P, O, min_tokens=41, max_tokens=50, stops=EOS),
        [MinNewTokensLengthLogitsProcessor(len(P), 41, EOS, device=str(DEVICE))],
    ),
    "min_tokens reached": (
        request(P, O, min_tokens=40, max_tokens=50, stops=EOS),
        [MinNewTokensLengthLogitsProcessor(len(P), 40, EOS, device=str(DEVICE))],
    ),
    "all together": (
        request(
            P,
            O,
            repetition_penalty=1.2,
            presence_penalty=0.3,
            frequency_penalty=0.2,
            logit_bias=BIAS,
            bad_words=WORDS,
            min_tokens=41,
            max_tokens=50,
            stops=EOS,
        ),
        [
            biased(BIAS),
            RepetitionPenaltyLogitsProcessor(1.2),
            openai_penalties(O, presence=0.3, frequency=0.2),
            NoBadWordsLogitsProcessor(WORDS),
            MinNewTokensLengthLogitsProcessor(len(P), 41, EOS, device=str(DEVICE)),
        ],
    ),
}
REQUESTS = [case for case, _ in CASES.values()]
