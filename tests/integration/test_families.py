"""Greedy tokens of each family equal those of transformers, at every boundary of size."""

import pytest

from compiled_llm import CompiledLLM
from tests.helpers.tiny_models import (
    FAMILIES,
    Reference,
    check_matches,
    greedy,
    poison,
    prompt_of,
    small_config,
    tiny_model,
)

pytestmark = pytest.mark.gpu

# Prefill buckets have 16 and 48 tokens, decode buckets 2 and 4 sequences; blocks have 16 tokens
# and windows 24.
LENGTHS = [1, 15, 16, 17, 23, 24, 25, 47, 48, 49, 100]
BATCHES = [[5], [16, 1], [15, 17, 16], [31, 32, 33, 1], [20, 3, 40, 8, 64, 2]]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_transformers(family: str) -> None:
    model = tiny_model(family)
    reference = Reference(model)
    with CompiledLLM(model, None, small_config(), progress=False) as llm:
        for number, lengths in enumerate([*([length] for length in LENGTHS), *BATCHES]):
            prompts = [prompt_of(length, seed=number) for length in lengths]
            poison(llm)
            expected = [reference(prompt, 20) for prompt in prompts]
            assert greedy(llm, prompts, 20) == expected, f"prompts of {lengths} tokens"
            llm.engine.cache.check()
        report = llm.report()
    assert not report.fallbacks
    assert not any(report.graph_events.values())
    assert all(bucket.replays for bucket in report.buckets)
    check_matches(report)
    assert model.config._attn_implementation != "compiled_llm"
