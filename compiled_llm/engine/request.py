"""A request on its way through the engine."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from compiled_llm.engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(slots=True, kw_only=True)
class Request:
    """One prompt and what has come of it.

    Attributes:
        prompt_token_ids, params: what was asked.
        token_ids: what was generated so far, a stopping token included.
        finish_reason: `stop` at a stopping token, `length` at a limit, None while it runs.
    """

    prompt_token_ids: Sequence[int]
    params: SamplingParams
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def append(self, token: int, *, eos_token_ids: frozenset[int], max_model_len: int) -> None:
        """Take the next token, and finish where it or a limit says so."""
        self.token_ids.append(token)
        stops = token in self.params.stop_token_ids or (token in eos_token_ids and not self.params.ignore_eos)
        if stops:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_tokens(max_model_len):
            self.finish_reason = "length"

    def max_tokens(self, max_model_len: int) -> int:
        """How many tokens it may generate."""
        return min(self.params.max_tokens, max_model_len - len(self.prompt_token_ids))
