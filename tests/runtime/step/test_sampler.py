"""Sampled ids are distributed as the softmax, and depend on the request alone."""

from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from compiled_llm.runtime.step.sampler import (
    process_logits,
    sample_full,
    sample_greedy,
    sample_random,
)
from tests.runtime.step.sampler_cases import (
    ALL,
    BIAS,
    INF,
    REQUESTS,
    VOCAB,
    WORDS,
    O,
    P,
    biased,
    openai_penalties,
    rand,
    request,
    rows_of,
    take,
)

pytestmark = pytest.mark.gpu

MIXES: list[dict[str, Any]] = [
    {"temperature": 0.6},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 2.0, "top_k": 50, "top_p": 0.7},
    {"temperature": 1.5, "top_p": 0.9, "min_p": 0.1},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
]
MIX_IDS = ["-".join(f"{name}={value:g}" for name, value in mix.items()) for mix in MIXES]


def test_greedy_is_the_first_maximum() -> None:
    for vocabulary in (7, 128, 151936, 49157):
        logits = rand(3, vocabulary)
        logits[1, 5] = logits[1, 3] = 100.0
        zeros = torch.zeros(3, dtype=torch.int64)
        assert torch.equal(sample_greedy(logits), logits.argmax(-1))
        assert torch.equal(sample_random(logits, torch.zeros(3), zeros, zeros), logits.argmax(-1))


def warped(
    logits_SV: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Return the logits that transformers' `generate` would sample from."""
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    return LogitsProcessorList(warpers)(None, logits_SV)


def fits(ids: Tensor, probabilities: Tensor) -> bool:
    """Return whether the draws have this distribution, and none of them has probability 0.

    Tokens that are expected less than 5 times count as one.
    """
    probabilities, ids = probabilities.cpu(), ids.cpu()
    expected = probabilities.double() * len(ids)
    counts = torch.bincount(ids, minlength=len(probabilities)).double()
    rare = expected < 5
    bins = [torch.cat([values[~rare], values[rare].sum()[None]]) for values in (counts, expected)]
    observed, wanted = (values if bins[1][-1] >= 5 else values[:-1] for values in bins)
    impossible = counts[probabilities == 0].sum() > 0
    return not impossible and (
        len(wanted) < 2 or chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3
    )


@pytest.mark.parametrize("mix", MIXES, ids=MIX_IDS)
def test_frequencies_are_those_of_the_warped_probabilities(mix: dict[str, Any]) -> None:
    """By position under one seed, and by seed at one position."""
    draws = 8000
    logits = (2 * rand(1, VOCAB)).expand(draws, -1)
    params, state = (take(rows, [0] * draws) for rows in rows_of([request(P, O, seed=7, **mix)]))
    probabilities, counting = warped(logits[:1], **mix)[0].softmax(-1), torch.arange(draws)
    assert fits(sample_full(logits, params, state, counting), probabilities)
    assert fits(
        sample_full(logits, params._replace(seed=counting), state, torch.full_like(counting, 12)),
        probabilities,
    )


def test_frequencies_of_the_random_sampler() -> None:
    draws, logits = 8000, 2 * rand(1, VOCAB)
    for temperature in (0.7, 1.0, 2.0):
        settings = torch.full((draws,), temperature), torch.full((draws,), 7), torch.arange(draws)
        assert fits(
            sample_random(logits.expand(draws, -1), *settings),
            (logits[0] / temperature).softmax(-1),
        )


def test_frequencies_after_adjustments() -> None:
    mix = {"temperature": 1.2, "top_k": 60, "top_p": 0.9}
    adjustments = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": BIAS}
    draws, logits = 8000, 2 * rand(1, VOCAB)
    wanted = request(P, O, bad_words=WORDS, **mix, **adjustments)
    params, state = (take(rows, [0] * draws) for rows in rows_of([wanted]))
    processors = [
        biased(BIAS),
        RepetitionPenaltyLogitsProcessor(1.3),
        openai_penalties(O, presence=0.5),
    ]
    scores = LogitsProcessorList([*processors, NoBadWordsLogitsProcessor(WORDS)])(
        torch.tensor([ALL]), logits.clone()
    )
    ids = sample_full(logits.expand(draws, -1), params, state, torch.arange(draws))
    assert fits(ids, warped(scores, **mix)[0].softmax(-1))


def test_each_draw_is_that_from_the_warped_logits() -> None:
    """All mixes are rows of one batch, at many positions.

    The `random` sampler draws from what the warpers leave.
    """
    requests = [request(P, O, seed=seed, **mix) for seed, mix in enumerate(MIXES)]
    params, state = rows_of(requests)
    for position in range(0, 2000, 50):
        logits = 3 * rand(len(MIXES), VOCAB, seed=position)
        positions = torch.full((len(MIXES),), position)
        left = torch.cat([warped(logits[row : row + 1], **mix) for row, mix in enumerate(MIXES)])
        expected = sample_random(left, torch.ones(len(MIXES)), params.seed, positions)
        assert torch.equal(sample_full(logits, params, state, positions), expected)


def test_draws_depend_on_seed_and_position_alone() -> None:
    seed = torch.tensor([1, 2, 3, 4, 2**40 + 1, 2**62, 0, 1, 2**63 - 1, 1])
    position = torch.tensor([5, 5, 6, 7, 5, 9, 0, 6, 3, 9])
    params, state = rows_of([request(P, O, **mix) for mix in MIXES])
    params, logits = params._replace(seed=seed), rand(len(MIXES), VOCAB)
    order = torch.tensor([3, 1, 9, 0, 2, 8, 5, 4, 7, 6])

    def full(rows: Tensor, logits: Tensor) -> Tensor:
        return sample_full(logits, take(params, rows), take(state, rows), position[rows])

    def random(rows: Tensor, logits: Tensor) -> Tensor:
        return sample_random(logits, torch.ones(len(rows)), seed[rows], position[rows])

    for sampler in (full, random):
        together = sampler(torch.arange(len(MIXES)), logits)
        assert torch.equal(sampler(order, logits[order]), together[order])
        for row in range(len(MIXES)):
            assert torch.equal(
                sampler(torch.tensor([row]), logits[row : row + 1]), together[row : row + 1]
            )
    assert len(set(random(torch.arange(len(MIXES)), torch.zeros(len(MIXES), VOCAB)).tolist())) > 7


def test_rows_of_temperature_zero_among_others() -> None:
    """Parameters that truncate a distribution have no effect on them."""
    greedy = {
        "temperature": 0.0,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.5,
        "repetition_penalty": 1.5,
        "logit_bias": BIAS,
    }
    drawn = {"temperature": 1.5, "repetition_penalty": 1.5, "logit_bias": BIAS}
    params, state = rows_of([request(P, O, **(drawn if row % 2 else greedy)) for row in range(100)])
    logits, position = rand(100, VOCAB), torch.arange(100)
    best = process_logits(logits, params, state).argmax(-1)
    ids = sample_full(logits, params, state, position)
    assert torch.equal(ids[::2], best[::2])
    assert (ids[1::2] != best[1::2]).sum() > 20


# Where the hash of seed 7 ends in all ones (the first four) or nearly all zeros: (position, token).
EXTREMES = [
    (146, 141579),
    (469, 110443),
    (754, 80284),
    (2342, 99923),
    (833, 122858),
    (926, 63551),
    (986, 58404),
]


def test_noise_is_finite() -> None:
    """Infinite noise would draw a nearly impossible token, or lose the only possible one."""
    position, token = torch.tensor(EXTREMES).unbind(1)
    ones, rows = torch.ones(len(EXTREMES)), torch.arange(len(EXTREMES))
    for most, least, chosen in ((0.0, -60.0, torch.full_like(token, 5)), (-INF, -INF, token)):
        logits = torch.full((len(EXTREMES), 151936), least)
        logits[:, 5] = most
        logits[rows, token] = torch.maximum(logits[rows, token], torch.tensor(-60.0))
        assert torch.equal(sample_random(logits, ones, torch.full_like(token, 7), position), chosen)


def test_compiled_is_eager() -> None:
    requests = [
        *REQUESTS,
        *(
            request(P, O, seed=seed, repetition_penalty=1.1, **mix)
            for seed, mix in enumerate(MIXES)
        ),
    ]
    compiled = torch.compile(sample_full, fullgraph=True)
    params, state = rows_of(requests)
    for step in range(3):
        inputs = (
            3 * rand(len(requests), VOCAB, seed=step),
            params,
            state,
            torch.arange(len(requests)) + step,
        )
        assert torch.equal(compiled(*inputs), sample_full(*inputs))
