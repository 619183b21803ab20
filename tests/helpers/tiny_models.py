"""Tiny random models of several families, and what transformers generates with them."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compiled_llm import CompiledLLM, Config, SamplingParams
from compiled_llm.config.loader import parse_config
from compiled_llm.report.report import Report
from tests.conftest import DEVICE

VOCAB_SIZE = 160
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_ALTERNATING = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 32},
    "gemma2": {
        "head_dim": 32,
        "sliding_window": 24,
        "layer_types": _ALTERNATING,
        "query_pre_attn_scalar": 32,
    },
    "gpt_oss": {
        "head_dim": 32,
        "sliding_window": 24,
        "layer_types": _ALTERNATING,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "phi3": {"sliding_window": 24, "num_key_value_heads": 4},
    "olmo2": {},
}


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """Return a random float32 model of two layers."""
    values = {**_COMMON, **FAMILIES[family], **changes}
    if family == "gpt2":
        values = {
            key: value
            for key, value in values.items()
            if key not in {"hidden_size", "num_hidden_layers", "max_position_embeddings"}
        }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **values), dtype=torch.float32
    )
    return model.to(DEVICE).eval()


class Reference:
    """Greedy generation by transformers, with eager attention, one prompt at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = copy.deepcopy(model)
        self._model.set_attn_implementation("eager")

    def __call__(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        ids = torch.tensor([list(prompt)], device=DEVICE)
        options = {"do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
        output = self._model.generate(ids, max_new_tokens=num_tokens, **options)
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens


def small_config(**changes: Any) -> Config:
    """Return a config of few small buckets: 4 sequences, 48 tokens a step, 128 of a sequence."""
    buckets = {"decode": [2], "prefill": [16], "samplers": ["greedy"], **changes.pop("buckets", {})}
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 48, "max_model_len": 128}
    compiling = {"artifact": "off", **changes.pop("compile", {})}
    return parse_config({"limits": limits, "buckets": buckets, "compile": compiling, **changes})


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()


def greedy(llm: CompiledLLM, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate(list(prompts), params)]


def check_matches(report: Report) -> None:
    """Assert that every pass with an expected number of matches found them."""
    found = [graph_pass for bucket in report.buckets for graph_pass in bucket.passes]
    assert all(
        p.matches == p.expected or p.name in ("hoist_step_invariants", "fuse_skinny_linear")
        for p in found
    )


def poison(llm: CompiledLLM) -> None:
    """Fill the KV cache with NaN. No request may run, so that no block is in use."""
    llm.reset_prefix_cache()
    for cache in llm.model_runner.memory.caches:
        cache.k.fill_(float("nan"))
        cache.v.fill_(float("nan"))
