"""A request on its way through the engine."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from compiled_llm.engine.detokenizer import Detokenizer
from compiled_llm.outputs import FinishReason, Logprob
from compiled_llm.sampling_params import SamplingParams


@dataclass(slots=True, kw_only=True)
class Timings:
    """When things happened, in seconds of `time.perf_counter`; None where they have not."""

    arrived: float = field(default_factory=time.perf_counter)
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One prompt, one completion, and what has come of it.

    Attributes:
        prompt_token_ids, params: what was asked.
        seed: what its draws depend on, besides their positions.
        max_tokens: how many tokens it may generate, all limits considered.
        stop_token_ids: ids that end it.
        bad_words: token sequences that it must not complete.
        priority: lower numbers go first; equals in the order of their arrival.
        detokenizer: where stop strings or a stream need the text as it comes.
        streaming: `token_ids` shall be kept current; otherwise they are there at the end.
        token_ids: what was generated so far, a stopping token included.
        logprobs, prompt_logprobs: for each token of the output or of the prompt, by token id; None where not asked for.
        finish_reason: `stop` at a stopping token or string, `length` at a limit, `abort` when it was withdrawn or waited too long,
            `error` when its own code failed; None while it runs.
        error: what went wrong.
        num_preemptions: how often it had to make room for others, and was computed again.
        num_cached_tokens: tokens of the prompt that were found in shared pages.
    """

    prompt_token_ids: Sequence[int]
    params: SamplingParams
    seed: int = 0
    max_tokens: int = 16
    stop_token_ids: frozenset[int] = frozenset()
    bad_words: list[list[int]] = field(default_factory=list)
    priority: int = 0
    detokenizer: Detokenizer | None = None
    streaming: bool = False
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    timings: Timings = field(default_factory=Timings)

    @property
    def watched(self) -> bool:
        """Whether each of its tokens must be looked at when it comes."""
        return self.streaming or self.detokenizer is not None or self.params.logprobs is not None

    def readable(self, token_ids: list[int]) -> list[int]:
        """Those of its new tokens that its text shall have: without a stopping one, unless that is asked for."""
        stops = (
            token_ids
            and token_ids[-1] in self.stop_token_ids
            and not self.params.include_stop_str_in_output
        )
        return token_ids[:-1] if stops else token_ids

    def __post_init__(self) -> None:
        if self.params.logprobs is not None:
            self.logprobs = []
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = []
