"""What is found of one model type."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["works", "unsupported", "fails"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was found of one type.

    Attributes:
        status: `works`: tokens equal, logits close; `unsupported`: refused by name, or no tiny model can be made;
            `fails`: anything else.
        reason: in words, where it does not work.
        difference: the largest relative difference of logits.
        exercised: what its attention has, in words.
    """

    status: Status
    reason: str = ""
    difference: float = 0.0
    exercised: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
