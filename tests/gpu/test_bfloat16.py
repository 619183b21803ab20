"""bfloat16: where tokens equal those of transformers, and when they are reproducible bit by bit.

The same sum in another order is another number.
"""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from compiled_llm import CompiledLLM, SamplingParams
from tests.helpers.arrivals import random_cases, rearranged, run_alone, run_together
from tests.helpers.tiny_models import prompt_of, small_config, tiny_model

LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 640}
MARGIN = 0.05


def _reference_logits(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Return the logits [len(tokens), V] float32 that these tokens are chosen from.

    They are computed by transformers' eager attention in the same dtype.
    """
    ids = torch.tensor([prompt + tokens], device=model.device)
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits[0, len(prompt) - 1 : -1].float()
    return logits


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_greedy_tokens_equal_transformers_where_its_choice_is_clear(family: str) -> None:
    model = tiny_model(family, max_position_embeddings=1024).to(torch.bfloat16)
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    prompts = [prompt_of(3 + 11 * number, number) for number in range(40)]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    num_clear = num_tokens = 0
    with CompiledLLM(model, None, small_config(limits=LIMITS), progress=False) as llm:
        for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
            tokens = torch.tensor(output.outputs[0].token_ids, device=model.device)
            best = _reference_logits(reference, prompt, tokens.tolist()).topk(2)
            clear = best.values[:, 0] - best.values[:, 1] > MARGIN
            assert torch.equal(tokens[clear], best.indices[clear, 0])
            num_clear, num_tokens = num_clear + int(clear.sum()), num_tokens + len(tokens)
        assert not llm.report().fallbacks
    assert num_clear > 0.5 * num_tokens


def test_one_bucket_gives_the_same_bits_in_any_order() -> None:
    """With one shape for all steps, a token's logits depend on its own sequence alone.

    Neither the batch nor the chunks of the prompt change them.
    """
    model = tiny_model("qwen3", max_position_embeddings=1024).to(torch.bfloat16)
    buckets = {"decode": [], "prefill": [64], "samplers": ["full"]}
    cache = {"memory": 44 * 16 * 2 * 2 * 2 * 32 * 2}  # a little more than one sequence
    cases = random_cases(120, longest=500, max_tokens=80)
    with CompiledLLM(
        model, None, small_config(limits=LIMITS, buckets=buckets, cache=cache), progress=False
    ) as llm:
        alone = [run_alone(llm, case) for case in cases]
        for arranged in (cases, rearranged(cases, 1), rearranged(cases, 2)):
            for expected, request in zip(alone, run_together(llm, arranged), strict=True):
                assert request.token_ids == expected.token_ids[: len(request.token_ids)]
                assert request.finish_reason in (expected.finish_reason, "abort")
        report = llm.report()
    assert report.scheduling.preemptions
    assert report.scheduling.cached_tokens
    assert report.scheduling.decode_steps == 0
    assert not report.fallbacks
