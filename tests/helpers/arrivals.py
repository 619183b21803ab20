"""Random requests that arrive and are aborted at random steps."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from compiled_llm import CompiledLLM, SamplingParams
from compiled_llm.engine.output_builder import RequestGroup
from compiled_llm.engine.request import Request
from compiled_llm.engine.run import run_to_completion
from tests.helpers.tiny_models import VOCAB_SIZE


def prefer_even(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Logits processor that depends on the last token."""
    bonus = (torch.arange(logits.shape[1], device=logits.device) + ids[0, -1]) % 2
    return logits + bonus


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0},
    {"temperature": 0.8},
    {"temperature": 1.2, "top_k": 20},
    {"temperature": 1.0, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0, "repetition_penalty": 1.3, "logprobs": 2},
    {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 0.7, "logit_bias": {7: 2.0, 9: -5.0}, "allowed_token_ids": tuple(range(3, 80))},
    {"temperature": 0.5, "min_tokens": 4, "stop_token_ids": tuple(range(3, 60))},
    {"temperature": 1.0, "logits_processors": (prefer_even,)},
]


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt, the step at which it arrives, and after how many steps it is aborted, if at all."""

    prompt: list[int]
    params: SamplingParams
    arrival: int
    abort_after: int | None


def random_cases(
    count: int,
    *,
    longest: int,
    max_tokens: int,
    seed: int = 0,
    samplings: Sequence[dict[str, Any]] = SAMPLINGS,
) -> list[Case]:
    """Return prompts of 1 to `longest` tokens that arrive over many steps.

    A third of them share a prefix, and a tenth is aborted.
    """
    rng = random.Random(seed)
    beginnings = [[rng.randrange(3, VOCAB_SIZE) for _ in range(longest)] for _ in range(3)]
    cases = []
    for number in range(count):
        length = rng.choice([rng.randint(1, longest), rng.randint(1, 60)])
        prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]
        if rng.random() < 0.34:
            shared = rng.randint(1, length)
            prompt[:shared] = rng.choice(beginnings)[:shared]
        sampling = {
            "ignore_eos": rng.random() < 0.7,
            "seed": number,
            "max_tokens": rng.randint(1, max_tokens),
            **rng.choice(samplings),
        }
        sampling["min_tokens"] = min(sampling.get("min_tokens", 0), sampling["max_tokens"])
        abort = rng.randint(0, 30) if rng.random() < 0.1 else None
        cases.append(Case(prompt, SamplingParams(**sampling), rng.randint(0, count), abort))
    return cases


def rearranged(cases: Sequence[Case], seed: int) -> list[Case]:
    """Return the same requests in another order of arrival, with other ones aborted."""
    rng = random.Random(seed)
    aborts = [rng.randint(0, 30) if rng.random() < 0.1 else None for _ in cases]
    return [
        replace(case, arrival=rng.randint(0, len(cases)), abort_after=abort)
        for case, abort in zip(cases, aborts, strict=True)
    ]


def run_together(llm: CompiledLLM, cases: Sequence[Case]) -> list[Request]:
    """Run all cases, and return their requests in order."""
    groups: dict[int, RequestGroup] = {}
    step = 0
    while len(groups) < len(cases) or llm.engine.has_work:
        for number, case in enumerate(cases):
            if number not in groups and case.arrival <= step:
                groups[number] = llm._runner.processor.process(case.prompt, case.params)
                llm.engine.validate(groups[number].requests[0])
                llm.engine.add_request(groups[number].requests[0])
            if (
                number in groups
                and case.abort_after is not None
                and step >= case.arrival + case.abort_after
            ):
                llm.engine.abort(groups[number].requests[0])
        llm.engine.step()
        llm.engine.cache.check()
        step += 1
        assert step < 100_000
    return [groups[number].requests[0] for number in range(len(cases))]


def run_alone(llm: CompiledLLM, case: Case) -> Request:
    """Run a case alone, without cached blocks, and return its request."""
    llm.reset_prefix_cache()
    (group,) = llm._runner.make_groups([case.prompt], case.params, None, streaming=False)
    for _ in run_to_completion(llm.engine, [group]):
        pass
    return group.requests[0]
