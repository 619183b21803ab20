"""What is to be generated: prompts as token ids and output lengths. Standard library alone, so that any peer's process has it."""

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Prompts as token ids, and how many tokens each is to generate, whatever they are; `temperature` 0 is greedy."""

    prompts: list[list[int]]
    output_lengths: list[int]
    temperature: float

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and output together."""
        return max(
            len(prompt) + n for prompt, n in zip(self.prompts, self.output_lengths, strict=True)
        )


def offline(
    num_prompts: int = 256,
    *,
    prompt_lengths: tuple[int, int] = (100, 1024),
    output_lengths: tuple[int, int] = (100, 1024),
    temperature: float = 0.6,
    vocab_size: int = 10001,
) -> Workload:
    """Random prompts and lengths, both ends included.

    The defaults are W1, the offline workload of nano-vllm and mini-sglang: 142,827 prompt and 133,966 output tokens.
    """
    rng, last = random.Random(0), min(10000, vocab_size - 1)
    prompts = [
        [rng.randint(0, last) for _ in range(rng.randint(*prompt_lengths))]
        for _ in range(num_prompts)
    ]
    return Workload(
        prompts=prompts,
        output_lengths=[rng.randint(*output_lengths) for _ in range(num_prompts)],
        temperature=temperature,
    )


def of_lengths(lengths: list[tuple[int, int]], *, temperature: float, vocab_size: int) -> Workload:
    """Random prompts of the given (prompt, output) lengths."""
    rng = random.Random(0)
    prompts = [[rng.randrange(vocab_size) for _ in range(length)] for length, _ in lengths]
    return Workload(
        prompts=prompts, output_lengths=[length for _, length in lengths], temperature=temperature
    )


def fresh_prompts(num_prompts: int, length: int, *, vocab_size: int, seed: int) -> list[list[int]]:
    """Random prompts of one length, which no other seed gives."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(num_prompts)]
