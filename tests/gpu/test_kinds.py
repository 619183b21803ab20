"""Kinds of models in bfloat16 with CUDA graphs: no fallbacks, and logits as good as eager.

`pytest tests/gpu/test_kinds.py -n 8` takes a few minutes, nearly all of it compiling.
"""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compiled_llm import CompiledLLM
from compiled_llm.config.schema import Config
from compiled_llm.report.report import Report
from tests.conftest import DEVICE
from tests.helpers.tiny_models import check_matches
from tests.model_sweep.check import CASES, engine_config, generate, random_prompt
from tests.model_sweep.tiny_configs import tiny_config
from tests.model_sweep.tiny_model import tiny_model

KINDS = {
    "bloom": "attention of its own, ALiBi",
    "deepseek_v3": "latent attention, experts",
    "diffllama": "several calls a layer",
    "falcon_h1": "states of a scan beside attention in each layer",
    "gemma3n_text": "keys and values shared by layers",
    "gemma4_text": "heads that differ by layer",
    "gpt_neo": "attention of its own, windows",
    "gpt_oss": "sinks, windows, experts",
    "lfm2": "states of convolutions",
    "llama4_text": "chunks, layers without positions, experts",
    "mixtral": "experts",
    "opt": "positions that are learned",
    "phimoe": "windows that are only in a mask",
    "qwen3_next": "states of a recurrence, experts",
    "vaultgemma": "softcap",
}


@pytest.mark.parametrize("model_type", KINDS)
def test_a_kind_in_bfloat16(model_type: str) -> None:
    exact = tiny_model(tiny_config(model_type)).to(DEVICE)
    report = check_in_bfloat16(exact, engine_config("direct"))
    assert {bucket.state for bucket in report.buckets} == {"graph"}
    assert all(bucket.replays for bucket in report.buckets)
    assert report.counters.graphs == len(report.buckets)
    assert not report.fallbacks
    assert not any(report.graph_events.values()), "skips, recompiles and re-records"
    check_matches(report)


def check_in_bfloat16(exact: PreTrainedModel, config: Config) -> Report:
    """Compare the logits of all cases' greedy tokens with those of float32.

    They must be about as close as those of transformers in bfloat16.
    """
    model = copy.deepcopy(exact).to(torch.bfloat16)
    theirs = copy.deepcopy(model)
    theirs.set_attn_implementation("eager")
    errors: list[tuple[Tensor, Tensor]] = []
    with CompiledLLM(model, None, config, progress=False) as llm:
        for lengths in CASES.values():
            prompts = [random_prompt(length) for length in lengths]
            for prompt, (tokens, logits) in zip(prompts, generate(llm, prompts), strict=True):
                right = _logits(exact, prompt, tokens)
                errors.append(
                    (_relative(logits, right), _relative(_logits(theirs, prompt, tokens), right))
                )
        report = llm.report()
    ours, eager = (torch.cat(found) for found in zip(*errors, strict=True))
    for share in (0.5, 0.9):
        assert ours.quantile(share) <= 1.5 * eager.quantile(share) + 0.005, (
            f"at {share:.0%} of the tokens"
        )
    return report


def _logits(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> Tensor:
    """Return the logits [len(tokens), V] float32 that these tokens are chosen from."""
    ids = torch.tensor([prompt + tokens], device=model.device)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float()


def _relative(logits: Tensor, right: Tensor) -> Tensor:
    """Return the largest difference of each row, relative to its largest value, [L]."""
    return (logits.to(right.device).float() - right).abs().amax(-1) / right.abs().amax(-1)
