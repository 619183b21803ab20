"""Outputs of generation; the names are those of vLLM."""

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, overload

T = TypeVar("T")

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """Log-probability of one token under the model's distribution.

    Attributes:
        logprob: natural logarithm of the probability, before temperature and penalties.
        rank: rank among all tokens, from 1.
        decoded_token: text of the token.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """Times of a completion in seconds; None before the event.

    Attributes:
        queue: from arrival until it was scheduled.
        time_to_first_token: from arrival to the first token.
        time_per_output_token: mean time between tokens; None for a single token.
        total: from arrival to the last token.
    """

    queue: float | None
    time_to_first_token: float | None
    time_per_output_token: float | None
    total: float | None


@dataclass(frozen=True, slots=True)
class ListPrefix(Generic[T]):
    """The first `length` items of a list that grows later."""

    items: list[T]
    length: int


class LazyListField(Generic[T]):
    """Dataclass field of a list (or None) that may be set to a `ListPrefix`.

    The prefix is copied when the field is first read. A stream makes an output for each step, of
    which few are read in full, so the time of a step does not grow with the number of tokens.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> "LazyListField[T]": ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> "LazyListField[T] | T":
        if instance is None:
            raise AttributeError(self._name)  # the dataclass field has no default
        value = instance.__dict__[self._name]
        if isinstance(value, ListPrefix):
            value = instance.__dict__[self._name] = value.items[: value.length]
        return value  # type: ignore[no-any-return]

    def __set__(self, instance: object, value: T | ListPrefix[Any]) -> None:
        instance.__dict__[self._name] = value


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: number of the completion, from 0.
        text: generated text; empty if the model has no tokenizer.
        token_ids: generated token ids, including a stop token.
        logprobs: for each token, log-probabilities by token id, that of the token itself first;
            None if not requested.
        finish_reason: `stop`, `length`, `abort` or `error`; None while it is unfinished.
        error: description of the failure, for `abort` and `error`.
        metrics: times of the completion.
    """

    index: int
    text: str
    token_ids: LazyListField[list[int]] = LazyListField()
    logprobs: LazyListField[list[dict[int, Logprob]] | None] = LazyListField()
    finish_reason: FinishReason | None
    error: str | None = None
    metrics: RequestMetrics | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A prompt and its completions.

    Attributes:
        prompt: text of the prompt; None if it was given in another form.
        prompt_token_ids: token ids of the prompt, in a list that all outputs of it share.
        outputs: the completions.
        prompt_logprobs: for each token of the prompt, log-probabilities by token id, None for the
            first token; None if not requested.
        num_cached_tokens: tokens of the prompt whose keys and values were in the prefix cache.
        request_id: name of the request.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    request_id: str | None = None

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.outputs[0].text

    @property
    def finished(self) -> bool:
        """Whether all completions have ended."""
        return all(output.finish_reason is not None for output in self.outputs)

    @property
    def usage(self) -> dict[str, int]:
        """Numbers of tokens, under the names of OpenAI's API."""
        prompt = len(self.prompt_token_ids)
        completion = sum(len(output.token_ids) for output in self.outputs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
