"""Logits after bias, penalties and bad words equal those of transformers' processors."""

import pytest
import torch
from transformers import LogitsProcessorList

from compiled_llm.engine.sampling_metadata import make_bias
from compiled_llm.runtime.step.sampler import process_logits, sample_full
from tests.runtime.step.sampler_cases import (
    CASES,
    EOS,
    INF,
    REQUESTS,
    VOCAB,
    P,
    rand,
    request,
    rows_of,
    take,
)

pytestmark = pytest.mark.gpu

LOGITS = 3 * rand(len(CASES), VOCAB)


@pytest.mark.parametrize("name", CASES)
def test_processed_logits_equal_those_of_transformers(name: str) -> None:
    """All cases are rows of one batch."""
    row, (wanted, processors) = list(CASES).index(name), CASES[name]
    ids = torch.tensor([[*wanted.prompt_token_ids, *wanted.token_ids]])
    expected = LogitsProcessorList(processors)(ids, LOGITS[row : row + 1].clone())[0]
    params, state = rows_of(REQUESTS)
    actual = process_logits(LOGITS, params, state)[row]
    assert torch.equal(actual.isinf(), expected.isinf())
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    changes = bool(processors) and name != "min_tokens reached"
    assert torch.equal(actual, LOGITS[row]) != changes
    positions = torch.zeros(len(CASES), dtype=torch.int64)
    assert sample_full(LOGITS, params, state, positions)[row] == expected.argmax()


def test_rows_do_not_influence_each_other() -> None:
    params, state = rows_of(REQUESTS)
    together = process_logits(LOGITS, params, state)
    for row in range(len(CASES)):
        alone = process_logits(LOGITS[row : row + 1], take(params, [row]), take(state, [row]))
        assert torch.equal(alone[0], together[row])


def test_a_bad_word_that_would_be_the_whole_text_is_banned() -> None:
    """transformers does not ban it where the text is nothing but the word's beginning."""
    params, state = rows_of([request([3, 4], bad_words=[[3, 4, 5], [2, 3, 4, 6]])])
    assert process_logits(LOGITS[:1], params, state)[0].isinf().nonzero().tolist() == [[5]]


def test_stopping_tokens_return_after_min_tokens() -> None:
    wanted = request(P, min_tokens=5, stops=[*EOS, VOCAB + 7], logit_bias={EOS[0]: 2.0})
    assert make_bias(wanted, VOCAB)[EOS].tolist() == [-INF, -INF]
    assert make_bias(wanted, VOCAB, min_tokens_reached=True)[EOS].tolist() == [2.0, 0.0]
