"""Workloads: prompts as token ids, and output lengths.

Only the standard library is imported, so that every system's process can import this module.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests that are submitted together.

    Attributes:
        prompts: token ids of each prompt.
        output_lengths: number of tokens to generate for each prompt; no token ends a request early.
        temperature: sampling temperature of all requests; 0 is greedy.
    """

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
    def max_sequence_length(self) -> int:
        """Return the number of tokens of the longest prompt together with its output."""
        pairs = zip(self.prompts, self.output_lengths, strict=True)
        return max(len(prompt) + length for prompt, length in pairs)


def offline_workload(
    num_prompts: int = 256,
    *,
    prompt_lengths: tuple[int, int] = (100, 1024),
    output_lengths: tuple[int, int] = (100, 1024),
    temperature: float = 0.6,
    vocab_size: int = 10001,
) -> Workload:
    """Return random prompts with uniformly distributed lengths; ranges include both ends.

    The defaults give the offline workload of nano-vllm and mini-sglang: 142,827 prompt tokens and
    133,966 output tokens.
    """
    rng = random.Random(0)
    max_token = min(10000, vocab_size - 1)
    prompts = [
        [rng.randint(0, max_token) for _ in range(rng.randint(*prompt_lengths))]
        for _ in range(num_prompts)
    ]
    return Workload(
        prompts=prompts,
        output_lengths=[rng.randint(*output_lengths) for _ in range(num_prompts)],
        temperature=temperature,
    )


def workload_of_lengths(
    lengths: Sequence[tuple[int, int]], *, temperature: float, vocab_size: int
) -> Workload:
    """Return random prompts of the given (prompt, output) lengths."""
    rng = random.Random(0)
    prompts = [[rng.randrange(vocab_size) for _ in range(length)] for length, _ in lengths]
    return Workload(
        prompts=prompts,
        output_lengths=[length for _, length in lengths],
        temperature=temperature,
    )


def random_prompts(num_prompts: int, length: int, *, vocab_size: int, seed: int) -> list[list[int]]:
    """Return random prompts of one length, different for each seed."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(num_prompts)]
