"""The sampler: greedy, distributed as softmax says, and a function of the request alone."""

import torch
from scipy.stats import chisquare

from compiled_llm.runtime.sampling import sample


def test_greedy_is_the_first_maximum() -> None:
    torch.manual_seed(0)
    for vocab in (7, 128, 151936, 49157):
        logits = torch.randn(3, vocab)
        logits[1, 5] = logits[1, 3] = 100.0
        zeros = torch.zeros(3, dtype=torch.int64)
        assert torch.equal(sample(logits, torch.zeros(3), zeros, zeros), logits.argmax(-1))


def test_frequencies_are_those_of_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 1.5])
    draws = 20000
    for temperature in (0.7, 1.0, 2.0):
        tokens = sample(logits.repeat(draws, 1), torch.full((draws,), temperature), torch.full((draws,), 7), torch.arange(draws))
        counts = torch.bincount(tokens, minlength=6)
        assert chisquare(counts, (logits.double() / temperature).softmax(0) * draws).pvalue > 1e-3


def test_draws_depend_on_seed_and_position_alone() -> None:
    torch.manual_seed(0)
    logits, temperature = torch.randn(8, 1000), torch.ones(8)
    seed, position = torch.tensor([1, 2, 3, 4, 2**40 + 1, 2**62, 0, 1]), torch.tensor([5, 5, 6, 7, 5, 9, 0, 6])
    together = sample(logits, temperature, seed, position)
    order = torch.randperm(8)
    assert torch.equal(sample(logits[order], temperature[order], seed[order], position[order]), together[order])
    same = logits[:1].expand(8, -1)
    assert len(set(sample(same, temperature, seed, position).tolist())) > 4
