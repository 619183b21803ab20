"""Construction of outputs: the text, token ids, logprobs and metrics of a group of requests."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from compiled_llm.engine.detokenizer import Detokenizer
from compiled_llm.engine.request import Request
from compiled_llm.engine.tokenizer_errors import is_unknown, raise_panic
from compiled_llm.errors import RequestFailedError
from compiled_llm.outputs import CompletionOutput, ListPrefix, RequestMetrics, RequestOutput


@dataclass(slots=True, kw_only=True)
class RequestGroup:
    """A prompt and the requests for its `n` completions.

    Attributes:
        prompt: text of the prompt; None if it was given in another form.
        requests: one for each completion.
        request_id: name given by the user.
        prompt_token_ids: list that all outputs of the group share; the engine does not read it.
    """

    prompt: str | None
    requests: Sequence[Request]
    request_id: str | None = None
    prompt_token_ids: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.prompt_token_ids = list(self.requests[0].prompt_token_ids)

    @property
    def finished(self) -> bool:
        """Whether all requests have ended."""
        return all(request.finish_reason is not None for request in self.requests)


class OutputBuilder:
    """Builds outputs for one model.

    Args:
        tokenizer: the model's tokenizer; None leaves texts empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer

    def build(self, group: RequestGroup) -> RequestOutput:
        """Return the output of a group so far.

        The text of an unfinished request is empty unless it has a detokenizer, and leaves out
        characters that may become part of a stop string.
        """
        first = group.requests[0]
        return RequestOutput(
            prompt=group.prompt,
            prompt_token_ids=group.prompt_token_ids,
            outputs=[
                self._completion(number, request) for number, request in enumerate(group.requests)
            ],
            prompt_logprobs=first.prompt_logprobs,
            num_cached_tokens=first.num_cached_tokens,
            request_id=group.request_id,
        )

    def decode_token(self, token: int) -> str:
        """Return the text of one token; "" without a tokenizer and for ids unknown to it."""
        if self._tokenizer is None:
            return ""
        try:
            return str(self._tokenizer.decode([token]))
        except BaseException as error:
            raise_panic(error)
            if isinstance(error, Exception) and is_unknown(self._tokenizer, token, error):
                return ""
            raise

    def _completion(self, number: int, request: Request) -> CompletionOutput:
        length, logprobs = len(request.token_ids), request.logprobs
        return CompletionOutput(
            index=number,
            text=self._text(request),
            token_ids=ListPrefix(request.token_ids, length),
            logprobs=None if logprobs is None else ListPrefix(logprobs, length),
            finish_reason=request.finish_reason,
            error=request.error,
            metrics=_metrics(request),
        )

    def _text(self, request: Request) -> str:
        finished = request.finish_reason is not None
        if request.detokenizer is not None:
            return request.detokenizer.stable_text(final=finished)
        if self._tokenizer is None or not finished:
            return ""
        detokenizer = None
        try:
            detokenizer = Detokenizer(
                self._tokenizer,
                request.sampling_params,
                request.prompt_token_ids,
                request.stop_token_ids,
            )
            detokenizer.push(request.token_ids)
        except Exception as error:  # raised by the tokenizer
            request.error = f"{type(error).__name__}: {error}"
            request.finish_reason = "error"
        return "" if detokenizer is None else detokenizer.text


def raise_failure(request: Request) -> None:
    """Raise RequestFailedError if the request failed, for callers that return only its text."""
    if request.error is not None:
        raise RequestFailedError(
            f"the request ended with {request.finish_reason!r}: {request.error}"
        )


def _metrics(request: Request) -> RequestMetrics:
    times, num_tokens = request.timings, len(request.token_ids)

    def since_arrival(moment: float | None) -> float | None:
        return None if moment is None else moment - times.arrived

    per_token = None
    if times.first_token is not None and times.last_token is not None and num_tokens > 1:
        per_token = (times.last_token - times.first_token) / (num_tokens - 1)
    return RequestMetrics(
        queue=since_arrival(times.scheduled),
        time_to_first_token=since_arrival(times.first_token),
        time_per_output_token=per_token,
        total=since_arrival(times.last_token),
    )
