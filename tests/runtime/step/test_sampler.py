"""The samplers: what transformers' logits processors give, distributed as softmax says, and a function of the request alone."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from compiled_llm.engine.request import Request
from compiled_llm.engine.sampling_metadata import (
    make_bias,
    make_sampler_state,
    pack_sampling_params,
)
from compiled_llm.runtime.step.sampler import (
    MAX_BAD_WORD_LEN,
    MAX_BAD_WORDS,
    History,
    RowParams,
    adjust,
    sample_full,
    sample_greedy,
    sample_random,
)
from compiled_llm.sampling_params import SamplingParams
from tests.conftest import DEVICE

pytestmark = pytest.mark.gpu

VOCAB = 300
INF = float("inf")
Processor = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    """New tensors are on the GPU where there is one."""
    with torch.device(DEVICE):
        yield


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
    return Request(sampling_params=wanted, seed=wanted.seed or 0, **ids)


def rows_of(requests: Sequence[Request]) -> tuple[RowParams, History]:
    """The rows' parameters and state, with the leavings of others wherever a request brings nothing."""
    count = len(requests)
    bias, counts = (
        torch.full((count, VOCAB), float("nan")),
        torch.full((count, VOCAB), 7, dtype=torch.int32),
    )
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
    params = RowParams.of(
        torch.from_numpy(np.stack([pack_sampling_params(wanted) for wanted in requests])).to(DEVICE)
    )
    return params, History(bias, counts, bad_words, recent)


def take(rows: Any, index: Any) -> Any:
    """Some of the rows of a `RowParams` or a `History`."""
    return type(rows)(*(value[index] for value in rows))


def biased(bias: dict[int, float]) -> Processor:
    return SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])


def only(ids: Sequence[int]) -> Processor:
    return SuppressTokensLogitsProcessor([token for token in range(VOCAB) if token not in ids])


def openai_penalties(
    output: Sequence[int], *, presence: float = 0, frequency: float = 0
) -> Processor:
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, where c[j] is how often j was generated."""

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
    "repetition rewarded": (request(P, O, repetition_penalty=0.5), [RepetitionPenaltyLogitsProcessor(0.5)]),
    "repetition of the prompt": (request(P, repetition_penalty=1.3), [RepetitionPenaltyLogitsProcessor(1.3)]),
    "presence": (request(P, O, presence_penalty=1.5), [openai_penalties(O, presence=1.5)]),
    "frequency": (request(P, O, frequency_penalty=-0.7), [openai_penalties(O, frequency=-0.7)]),
    "both": (request(P, O, presence_penalty=-2, frequency_penalty=1.1), [openai_penalties(O, presence=-2, frequency=1.1)]),
    "both before any output": (request(P, presence_penalty=1.0, frequency_penalty=1.0), []),
    "bias": (request(P, O, logit_bias=BIAS), [biased(BIAS)]),
    "allowed ids": (request(P, O, allowed_token_ids=[5, 60, 299]), [only([5, 60, 299])]),
    "allowed ids and bias": (request(P, O, allowed_token_ids=[5, 60], logit_bias=BIAS), [biased(BIAS), only([5, 60])]),
    "bad words": (request(P, O, bad_words=WORDS), [NoBadWordsLogitsProcessor(WORDS)]),
    "bad tokens": (request(P, O, bad_words=[[5], [299]]), [NoBadWordsLogitsProcessor([[5], [299]])]),
    "a bad word across prompt and output": (request(P, O[:1], bad_words=ACROSS), [NoBadWordsLogitsProcessor(ACROSS)]),
    "bad words longer than the text": (request([9, 4], bad_words=MANY), []),
    "as many bad words as there may be": (request(P, O, bad_words=MANY), [NoBadWordsLogitsProcessor(MANY)]),
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
            P, O, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2, logit_bias=BIAS, bad_words=WORDS,
            min_tokens=41, max_tokens=50, stops=EOS,
        ),
        [
            biased(BIAS), RepetitionPenaltyLogitsProcessor(1.2), openai_penalties(O, presence=0.3, frequency=0.2),
            NoBadWordsLogitsProcessor(WORDS), MinNewTokensLengthLogitsProcessor(len(P), 41, EOS, device=str(DEVICE)),
        ],
    ),
}  # fmt: skip
LOGITS = 3 * rand(len(CASES), VOCAB)
REQUESTS = [wanted for wanted, _ in CASES.values()]


@pytest.mark.parametrize("name", CASES)
def test_adjusted_logits_are_those_of_transformers(name: str) -> None:
    """All cases are rows of one batch."""
    row, (wanted, processors) = list(CASES).index(name), CASES[name]
    ids = torch.tensor([[*wanted.prompt_token_ids, *wanted.token_ids]])
    expected = LogitsProcessorList(processors)(ids, LOGITS[row : row + 1].clone())[0]
    params, history = rows_of(REQUESTS)
    actual = adjust(LOGITS, params, history)[row]
    assert torch.equal(actual.isinf(), expected.isinf())
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    changes = bool(processors) and name != "min_tokens reached"
    assert torch.equal(actual, LOGITS[row]) != changes
    assert (
        sample_full(LOGITS, params, history, torch.zeros(len(CASES), dtype=torch.int64))[row]
        == expected.argmax()
    )


def test_rows_do_not_influence_each_other() -> None:
    params, history = rows_of(REQUESTS)
    together = adjust(LOGITS, params, history)
    for row in range(len(CASES)):
        alone = adjust(LOGITS[row : row + 1], take(params, [row]), take(history, [row]))
        assert torch.equal(alone[0], together[row])


def test_a_bad_word_that_would_be_the_whole_text_is_banned() -> None:
    """transformers lets a text that consists of nothing but the word's beginning complete it."""
    params, history = rows_of([request([3, 4], bad_words=[[3, 4, 5], [2, 3, 4, 6]])])
    assert adjust(LOGITS[:1], params, history)[0].isinf().nonzero().tolist() == [[5]]


def test_stopping_tokens_return_after_min_tokens() -> None:
    wanted = request(P, min_tokens=5, stops=[*EOS, VOCAB + 7], logit_bias={EOS[0]: 2.0})
    assert make_bias(wanted, VOCAB)[EOS].tolist() == [-INF, -INF]
    assert make_bias(wanted, VOCAB, min_tokens_reached=True)[EOS].tolist() == [2.0, 0.0]


def test_greedy_is_the_first_maximum() -> None:
    for vocabulary in (7, 128, 151936, 49157):
        logits = rand(3, vocabulary)
        logits[1, 5] = logits[1, 3] = 100.0
        zeros = torch.zeros(3, dtype=torch.int64)
        assert torch.equal(sample_greedy(logits), logits.argmax(-1))
        assert torch.equal(sample_random(logits, torch.zeros(3), zeros, zeros), logits.argmax(-1))


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


def warped(
    logits_SV: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Logits as transformers' `generate` would sample from them."""
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    return LogitsProcessorList(warpers)(None, logits_SV)


def fits(ids: Tensor, probabilities: Tensor) -> bool:
    """Whether the draws are distributed like that, and none is of probability 0; tokens seen less than 5 times are lumped."""
    probabilities, ids = probabilities.cpu(), ids.cpu()
    expected, counts = (
        probabilities.double() * len(ids),
        torch.bincount(ids, minlength=len(probabilities)).double(),
    )
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
    params, history = (take(rows, [0] * draws) for rows in rows_of([request(P, O, seed=7, **mix)]))
    probabilities, counting = warped(logits[:1], **mix)[0].softmax(-1), torch.arange(draws)
    assert fits(sample_full(logits, params, history, counting), probabilities)
    assert fits(
        sample_full(logits, params._replace(seed=counting), history, torch.full_like(counting, 12)),
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
    params, history = (take(rows, [0] * draws) for rows in rows_of([wanted]))
    processors = [
        biased(BIAS),
        RepetitionPenaltyLogitsProcessor(1.3),
        openai_penalties(O, presence=0.5),
    ]
    scores = LogitsProcessorList([*processors, NoBadWordsLogitsProcessor(WORDS)])(
        torch.tensor([ALL]), logits.clone()
    )
    ids = sample_full(logits.expand(draws, -1), params, history, torch.arange(draws))
    assert fits(ids, warped(scores, **mix)[0].softmax(-1))


def test_each_draw_is_that_from_the_warped_logits() -> None:
    """All mixes are rows of one batch, at many positions; the random sampler takes what the warpers leave."""
    requests = [request(P, O, seed=seed, **mix) for seed, mix in enumerate(MIXES)]
    params, history = rows_of(requests)
    for position in range(0, 2000, 50):
        logits, positions = (
            3 * rand(len(MIXES), VOCAB, seed=position),
            torch.full((len(MIXES),), position),
        )
        left = torch.cat([warped(logits[row : row + 1], **mix) for row, mix in enumerate(MIXES)])
        expected = sample_random(left, torch.ones(len(MIXES)), params.seed, positions)
        assert torch.equal(sample_full(logits, params, history, positions), expected)


def test_draws_depend_on_seed_and_position_alone() -> None:
    seed, position = (
        torch.tensor([1, 2, 3, 4, 2**40 + 1, 2**62, 0, 1, 2**63 - 1, 1]),
        torch.tensor([5, 5, 6, 7, 5, 9, 0, 6, 3, 9]),
    )
    params, history = rows_of([request(P, O, **mix) for mix in MIXES])
    params, logits, order = (
        params._replace(seed=seed),
        rand(len(MIXES), VOCAB),
        torch.tensor([3, 1, 9, 0, 2, 8, 5, 4, 7, 6]),
    )

    def full(rows: Tensor, logits: Tensor) -> Tensor:
        return sample_full(logits, take(params, rows), take(history, rows), position[rows])

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
    """What would truncate their distribution does nothing."""
    greedy = {
        "temperature": 0.0,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.5,
        "repetition_penalty": 1.5,
        "logit_bias": BIAS,
    }
    drawn = {"temperature": 1.5, "repetition_penalty": 1.5, "logit_bias": BIAS}
    params, history = rows_of(
        [request(P, O, **(drawn if row % 2 else greedy)) for row in range(100)]
    )
    logits, position = rand(100, VOCAB), torch.arange(100)
    best, ids = (
        adjust(logits, params, history).argmax(-1),
        sample_full(logits, params, history, position),
    )
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
    """Infinite noise would draw a token that is as good as impossible, or lose the only possible one."""
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
    params, history = rows_of(requests)
    for step in range(3):
        inputs = (
            3 * rand(len(requests), VOCAB, seed=step),
            params,
            history,
            torch.arange(len(requests)) + step,
        )
        assert torch.equal(compiled(*inputs), sample_full(*inputs))
