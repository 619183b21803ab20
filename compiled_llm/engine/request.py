"""State of a request in the engine."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from compiled_llm.engine.detokenizer import Detokenizer
from compiled_llm.outputs import FinishReason, Logprob
from compiled_llm.sampling_params import SamplingParams


@dataclass(slots=True, kw_only=True)
class Timings:
    """Times of events, in seconds of `time.perf_counter`; None before the event."""

    arrived: float = field(default_factory=time.perf_counter)
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One prompt and one completion.

    Attributes:
        prompt_token_ids: token ids of the prompt.
        sampling_params: sampling parameters as given by the user.
        seed: seed of its random draws, which depend on it and on their positions alone.
        max_tokens: number of tokens it may generate, within all limits.
        stop_token_ids: token ids that end it.
        bad_words: token sequences that it must not generate.
        priority: lower numbers are scheduled first, equal ones in the order of arrival.
        detokenizer: detokenizer that runs with each token, for stop strings and streams.
        streaming: whether `token_ids` is updated after each step, rather than only at the end.
        token_ids: tokens generated so far, including a stop token.
        logprobs: for each generated token, log-probabilities by token id; None if not requested.
        prompt_logprobs: the same for each token of the prompt, None for the first.
        finish_reason: `stop` at a stop token or stop string, `length` at a limit, `abort` when it
            was aborted or waited too long, `error` when it failed; None while it is unfinished.
        error: description of the failure.
        num_preemptions: number of times its blocks were freed for others and it was computed again.
        num_cached_tokens: tokens of the prompt whose blocks were in the prefix cache.
    """

    prompt_token_ids: Sequence[int]
    sampling_params: SamplingParams
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

    def __post_init__(self) -> None:
        if self.sampling_params.logprobs is not None:
            self.logprobs = []
        if self.sampling_params.prompt_logprobs is not None:
            self.prompt_logprobs = []

    @property
    def needs_host_update(self) -> bool:
        """Whether the host must process each of its tokens one by one."""
        wants_logprobs = self.sampling_params.logprobs is not None
        return self.streaming or self.detokenizer is not None or wants_logprobs
