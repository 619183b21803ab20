"""What generation returns; the shapes are vLLM's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, overload

from numpy.typing import NDArray

T = TypeVar("T")

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """One token's log-probability under the model's own distribution, and its rank in it, from 1."""

    logprob: float
    rank: int
    decoded_token: str | None = None


def by_token(
    token: int,
    values: NDArray[Any],
    ids: NDArray[Any],
    count: int | None,
    decode: Callable[[int], str] | None,
) -> dict[int, Logprob]:
    """The chosen token's logprob and the top ones, of one row of `passes.ops.top_logprobs`."""
    ranks = [int(ids[0]), *range(1, (count or 0) + 1)]
    tokens = [token, *ids[1 : len(ranks)].tolist()]
    found: dict[int, Logprob] = {}
    for number, value, rank in zip(tokens, values.tolist(), ranks, strict=False):
        found.setdefault(
            number,
            Logprob(
                logprob=value,
                rank=rank,
                decoded_token=decode(number) if decode is not None else None,
            ),
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """Seconds: in the queue, to the first token (the queue included), between tokens on average, and in all."""

    queue: float | None
    time_to_first_token: float | None
    time_per_output_token: float | None
    total: float | None


@dataclass(frozen=True, slots=True)
class Beginning(Generic[T]):
    """The first `length` items of a list to which more are appended later."""

    items: list[T]
    length: int


class CopiedWhenRead(Generic[T]):
    """A list (or None) of a dataclass that may be set to a `Beginning`, which is copied when it is first read.

    A stream makes an output for each step, and few of them are read in full, so a step does not take longer the more tokens
    have come.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> "CopiedWhenRead[T]": ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> "CopiedWhenRead[T] | T":
        if instance is None:
            raise AttributeError(self._name)  # the field has no default
        value = instance.__dict__[self._name]
        if isinstance(value, Beginning):
            value = instance.__dict__[self._name] = value.items[: value.length]
        return value  # type: ignore[no-any-return]

    def __set__(self, instance: object, value: T | Beginning[Any]) -> None:
        instance.__dict__[self._name] = value


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One completion. `text` is empty when the model has no tokenizer.

    Attributes:
        token_ids: a stopping token included.
        logprobs: for each token, by token id, the one drawn first; None unless asked for.
        finish_reason: `stop`, `length`, `abort` or `error`; None while it runs.
        error: what went wrong, for `abort` and `error`.
    """

    index: int
    text: str
    token_ids: CopiedWhenRead[list[int]] = CopiedWhenRead()
    logprobs: CopiedWhenRead[list[dict[int, Logprob]] | None] = CopiedWhenRead()
    finish_reason: FinishReason | None
    error: str | None = None
    metrics: RequestMetrics | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A prompt and its completions; `prompt` is None when it was given as token ids.

    Attributes:
        prompt_token_ids: a list that all outputs of the prompt share.
        prompt_logprobs: for each token of the prompt, by token id, None for the first; None unless asked for.
        num_cached_tokens: tokens of the prompt whose keys and values an earlier request had left, or a sibling shares.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    request_id: str | None = None

    @property
    def text(self) -> str:
        """The text of the first completion."""
        return self.outputs[0].text

    @property
    def finished(self) -> bool:
        """Whether all completions have ended."""
        return all(output.finish_reason is not None for output in self.outputs)

    @property
    def usage(self) -> dict[str, int]:
        """Token counts under OpenAI's names."""
        prompt, completion = (
            len(self.prompt_token_ids),
            sum(len(output.token_ids) for output in self.outputs),
        )
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
