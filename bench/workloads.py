"""Workloads that several benchmarks and peers run."""

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts as token ids, and how many tokens each is to generate, whatever they are."""

    prompts: list[list[int]]
    output_lengths: list[int]
    temperature: float

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lengths)


def offline(num_prompts: int = 256, *, longest: int = 1024) -> Workload:
    """The offline workload of nano-vllm and mini-sglang: 256 random prompts and outputs of 100 to 1024 tokens, temperature 0.6."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, longest))] for _ in range(num_prompts)]
    return Workload(prompts, [rng.randint(100, longest) for _ in range(num_prompts)], temperature=0.6)
