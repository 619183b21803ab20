"""The compared systems, behind one interface; each runs in a process of its own.

Only the standard library is imported here, because the environment of another system may lack our
dependencies. See `bench.worker` for the processes.
"""

from dataclasses import dataclass
from typing import Any, Protocol

SYSTEMS: dict[str, str] = {
    "ours": "bench.systems.ours_stepped:OursStepped",
    "ours-eager": "bench.systems.ours_stepped:OursEager",
    "ours-torch": "bench.systems.ours_stepped:OursTorch",
    "transformers": "bench.systems.transformers_generate:TransformersEager",
    "transformers-compile": "bench.systems.transformers_generate:TransformersCompile",
    "transformers-batching": "bench.systems.transformers_batching:TransformersBatching",
    "vllm": "bench.systems.vllm_offline:VLLM",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Model, device and limits that all systems receive.

    Attributes:
        config: values of a `compiled_llm` config.
        dtype: resolved dtype of the weights, such as `bfloat16`.
        device: resolved device type, such as `cuda`.
        max_num_seqs: resolved limit on sequences in a batch.
        max_num_batched_tokens: resolved limit on tokens in a step.
        max_model_len: resolved limit on tokens in a sequence.
        memory_share: fraction of the GPU's memory for this system; None without other systems.
        memory_before: sum of the fractions of the systems that started earlier.
    """

    config: dict[str, Any]
    dtype: str
    device: str
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    memory_share: float | None = None
    memory_before: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateResult:
    """Result of one call of `System.generate`.

    Attributes:
        counts: number of generated tokens of each request.
        seconds: wall time of the call.
        counters: engine counters over the call; empty for systems that have none.
    """

    counts: list[int]
    seconds: float
    counters: dict[str, float]


class System(Protocol):
    """One way to run a model.

    The constructor takes the fields of a `Setup` as keyword arguments. Arguments and results of all
    methods are JSON values.
    """

    def start(self) -> float:
        """Load, compile and capture; return the seconds until the system can generate."""
        ...

    def generate(
        self, prompts: list[list[int]], output_lengths: list[int], temperature: float
    ) -> dict[str, Any]:
        """Generate exactly `output_lengths[i]` tokens for prompt `i`; submit all prompts at once.

        Returns the fields of a `GenerateResult`. Results cached for earlier prompts must not be
        reused.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Return the version, and settings that affect the results."""
        ...

    def close(self) -> None:
        """Free all resources."""
        ...


def validate_systems(names: list[str]) -> list[str]:
    """Return the names unchanged.

    Raises:
        ValueError: a name is unknown, or there is none.
    """
    unknown = [name for name in names if name not in SYSTEMS]
    if unknown or not names:
        given = ", ".join(unknown) or "(none given)"
        raise ValueError(f"unknown system {given}: expected some of {', '.join(SYSTEMS)}")
    return names
