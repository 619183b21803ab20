"""How far back an attention layer sees: all earlier tokens, a sliding window, or chunks.

The attention ops take the reach as one integer, since an op's schema and a kernel's constants hold
no classes. `AttentionReach.encode` and `AttentionReach.decode` convert between the two.
"""

from dataclasses import dataclass
from typing import Literal, Self, TypeVar

from torch import Tensor

Positions = TypeVar("Positions", int, Tensor)


@dataclass(frozen=True, slots=True)
class AttentionReach:
    """The keys that a causal attention layer lets each query see.

    Attributes:
        kind: `full`, all tokens up to the query; `sliding`, the last `size` tokens, the query
            included; `chunked`, the tokens up to the query in its own chunk of `size` tokens.
        size: tokens of the window or chunk, at least 1; 0 for `full`.
    """

    kind: Literal["full", "sliding", "chunked"] = "full"
    size: int = 0

    @classmethod
    def sliding(cls, size: int) -> Self:
        """Return the reach of a sliding window of `size` tokens."""
        return cls("sliding", size)

    @classmethod
    def chunked(cls, size: int) -> Self:
        """Return the reach of attention within chunks of `size` tokens."""
        return cls("chunked", size)

    @classmethod
    def decode(cls, window: int) -> Self:
        """Return the reach that an op's `window` argument stands for."""
        if window == 0:
            return cls()
        return cls.sliding(window) if window > 0 else cls.chunked(-window)

    def encode(self) -> int:
        """Return the ops' `window` argument: 0 for full, W for sliding, -C for chunked."""
        return -self.size if self.kind == "chunked" else self.size

    @property
    def is_full(self) -> bool:
        """Whether every query sees all tokens before it."""
        return self.size == 0

    def first_visible(self, positions: Positions) -> Positions:
        """Return the first token that a query at each position sees; it may be below 0."""
        if self.kind == "sliding":
            return positions - self.size + 1
        if self.kind == "chunked":
            return positions // self.size * self.size
        return positions * 0

    def __str__(self) -> str:
        """Return the reach in words, such as "window of 24"."""
        if self.kind == "sliding":
            return f"window of {self.size}"
        return f"chunks of {self.size}" if self.kind == "chunked" else "all tokens"


FULL = AttentionReach()
