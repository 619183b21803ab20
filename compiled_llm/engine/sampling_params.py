"""How a request wants its tokens chosen; the names and defaults are vLLM's."""

import math
from dataclasses import dataclass

_MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling options of one request.

    Args:
        temperature: 0 is greedy; above, logits are divided by it.
        max_tokens: the most tokens to generate; the model's length limit may end a request earlier.
        seed: with it, the same request draws the same tokens whatever runs beside it; drawn at random when None.
        stop_token_ids: ids that end the request, besides the model's own end of sequence.
        ignore_eos: go on past the model's end of sequence.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 1.0
    max_tokens: int = 16
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not math.isfinite(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature must be a number of at least 0, got {self.temperature!r}")
        if not _is_int(self.max_tokens) or self.max_tokens < 1:
            raise ValueError(f"max_tokens must be a whole number of at least 1, got {self.max_tokens!r}")
        if self.seed is not None and not (_is_int(self.seed) and 0 <= self.seed <= _MAX_SEED):
            raise ValueError(f"seed must be a whole number from 0 to {_MAX_SEED}, got {self.seed!r}")
        if not all(_is_int(token) for token in self.stop_token_ids):
            raise ValueError(f"stop_token_ids must be whole numbers, got {self.stop_token_ids!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or isinstance(value, float)
