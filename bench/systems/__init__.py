"""The systems that are compared, behind one interface; each lives in a process of its own (see `bench.worker`).

Only the standard library is imported here: a peer's environment may lack what ours has.
"""

from dataclasses import dataclass
from typing import Any, Protocol

SYSTEMS: dict[str, str] = {
    "ours": "bench.systems.ours_steps:Steps",
    "ours-eager": "bench.systems.ours_steps:EagerSteps",
    "ours-torch": "bench.systems.ours_steps:TorchSteps",
    "transformers": "bench.systems.transformers_generate:TransformersEager",
    "transformers-compile": "bench.systems.transformers_generate:TransformersCompile",
    "transformers-batching": "bench.systems.transformers_batching:TransformersBatching",
    "vllm": "bench.systems.vllm_offline:Vllm",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every system is told of the model and the machine.

    Attributes:
        config: the values of a `compiled_llm` config.
        dtype, device: resolved, e.g. `bfloat16` and `cuda`.
        max_num_seqs, max_num_batched_tokens, max_model_len: resolved limits.
        memory_share: the share of the GPU's memory that this system may take; None where it has the GPU to itself.
        memory_before: the shares of the systems that started before it, added up.
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
class Generated:
    """What one call of `generate` gave: tokens of each request, wall seconds, and counters that only some systems have."""

    counts: list[int]
    seconds: float
    counters: dict[str, float]


class System(Protocol):
    """One way to run a model. Made with the fields of a `Setup`; arguments and results are plain data."""

    def start(self) -> float:
        """Load, compile, capture; returns the seconds until it is ready to generate."""
        ...

    def generate(
        self, prompts: list[list[int]], output_lengths: list[int], temperature: float
    ) -> dict[str, Any]:
        """Exactly so many tokens for each prompt, whatever they are, all submitted at once; returns the fields of `Generated`.

        Nothing computed for earlier prompts may be used again.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Its version and settings that a reader of the results should know."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


def check_names(names: list[str]) -> list[str]:
    """The names as they are; raises a ValueError that lists the known ones."""
    unknown = [name for name in names if name not in SYSTEMS]
    if unknown or not names:
        raise ValueError(
            f"unknown system {', '.join(unknown) or '(none given)'}: expected some of {', '.join(SYSTEMS)}"
        )
    return names
