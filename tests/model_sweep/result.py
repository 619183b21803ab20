"""Result of checking one model type."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["works", "unsupported", "fails"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelResult:
    """Result of checking one model type.

    Attributes:
        status: `works` if all tokens are equal and all logits close; `unsupported` if the model is
            refused with a reason, or if no tiny model can be built; `fails` otherwise.
        reason: reason of a status other than `works`.
        difference: largest relative difference of logits.
        exercised: features of the model's attention.
    """

    status: Status
    reason: str = ""
    difference: float = 0.0
    exercised: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.status == "works":
            return f"{self.difference:.1e}  {self.exercised}"
        return self.reason
