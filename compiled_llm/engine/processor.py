"""Prompts to requests, and requests to outputs: what the synchronous and the asynchronous API share."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from transformers import GenerationConfig, PreTrainedTokenizerBase

from compiled_llm.engine.detokenizer import Detokenizer
from compiled_llm.engine.prompts import (
    Message,
    Prompt,
    check_message,
    is_conversation,
    token_ids_of,
)
from compiled_llm.engine.request import Request
from compiled_llm.engine.unknown_tokens import is_unknown, raise_panic
from compiled_llm.errors import RequestFailedError
from compiled_llm.outputs import Beginning, CompletionOutput, RequestMetrics, RequestOutput
from compiled_llm.sampling_params import SamplingParams

_MAX_SEED = 2**63 - 1
_CHARACTERS_PER_TOKEN = (
    16  # texts of more than these for each token that fits are looked at before they are tokenised
)


@dataclass(slots=True, kw_only=True)
class RequestGroup:
    """A prompt and the requests for its `n` completions.

    Attributes:
        prompt_token_ids: for all of the job's outputs, apart from what the engine reads.
    """

    prompt: str | None
    requests: list[Request]
    request_id: str | None = None
    prompt_token_ids: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.prompt_token_ids = list(self.requests[0].prompt_token_ids)

    @property
    def finished(self) -> bool:
        return all(request.finish_reason is not None for request in self.requests)


class RequestProcessor:
    """Makes jobs for one model, and their outputs.

    Args:
        tokenizer: the model's, if it has one.
        generation_config: the checkpoint's; it says what sampling parameters are the default, and which tokens end a text.
        max_model_len: the most tokens of a prompt and its completion.
        tokenizer_failure: why the model's tokenizer could not be loaded, for errors that miss it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        generation_config: GenerationConfig | None,
        *,
        max_model_len: int,
        tokenizer_failure: str | None = None,
    ) -> None:
        self._tokenizer, self._max_model_len = tokenizer, max_model_len
        self._missing = "this model has no tokenizer"
        if tokenizer_failure is not None:
            self._missing += f" ({tokenizer_failure})"
        self.default_params = SamplingParams.from_generation_config(generation_config)
        self._eos = _eos_token_ids(tokenizer, generation_config)

    def make(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        streaming: bool = False,
        request_id: str | None = None,
    ) -> RequestGroup:
        """A prompt's requests, not checked against the engine yet; raises ValueError."""
        params = self.default_params if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, got {type(params).__name__}")
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise ValueError(f"priority must be a whole number, got {priority!r}")
        if not isinstance(request_id, str | None):
            raise ValueError(f"request_id must be text or None, got {request_id!r}")
        text = prompt if isinstance(prompt, str) else None
        ids, bad_words = self._encode(prompt), self._bad_words(params)
        seed = secrets.randbits(62) if params.seed is None else params.seed
        requests = [
            Request(
                prompt_token_ids=ids,
                params=params,
                seed=(seed + number) & _MAX_SEED,
                max_tokens=min(
                    params.max_tokens or self._max_model_len, max(1, self._max_model_len - len(ids))
                ),
                stop_token_ids=frozenset(params.stop_token_ids)
                | (frozenset() if params.ignore_eos else self._eos),
                bad_words=bad_words,
                priority=priority,
                detokenizer=self._detokenizer(params, ids) if streaming or params.stop else None,
                streaming=streaming,
            )
            for number in range(params.n)
        ]
        return RequestGroup(prompt=text, requests=requests, request_id=request_id)

    def check_stream(self, params: SamplingParams | None) -> None:
        """Raise a ValueError unless a request with these params can be streamed as text."""
        if self._tokenizer is None:
            raise ValueError(
                f"stream() yields text, and {self._missing}: pass one, or use generate()"
            )
        if params is not None and params.n > 1:
            raise ValueError(f"stream() yields one completion, got n={params.n}: use generate()")

    def output(self, job: RequestGroup) -> RequestOutput:
        """What has come of a job so far; text of running requests only where it streams."""
        first = job.requests[0]
        return RequestOutput(
            prompt=job.prompt,
            prompt_token_ids=job.prompt_token_ids,
            outputs=[
                self._completion(number, request) for number, request in enumerate(job.requests)
            ],
            prompt_logprobs=first.prompt_logprobs,
            num_cached_tokens=first.num_cached_tokens,
            request_id=job.request_id,
        )

    def decode_token(self, token: int) -> str:
        """One token's text, "" without a tokenizer and for ids that the tokenizer does not know."""
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
            token_ids=Beginning(request.token_ids, length),
            logprobs=None if logprobs is None else Beginning(logprobs, length),
            finish_reason=request.finish_reason,
            error=request.error,
            metrics=_metrics(request),
        )

    def _text(self, request: Request) -> str:
        if request.detokenizer is not None:
            return request.detokenizer.text
        if self._tokenizer is None or request.finish_reason is None:
            return ""
        detokenizer = None
        try:
            detokenizer = Detokenizer(self._tokenizer, request.params, request.prompt_token_ids)
            detokenizer.push(request.readable(request.token_ids))
        except Exception as error:  # the tokenizer's own
            request.finish_reason, request.error = "error", f"{type(error).__name__}: {error}"
        return "" if detokenizer is None else detokenizer.text

    def _detokenizer(self, params: SamplingParams, prompt: Sequence[int]) -> Detokenizer | None:
        if self._tokenizer is None:
            if params.stop:
                raise ValueError(
                    f"stop strings need a tokenizer, and {self._missing}: pass one, or use stop_token_ids"
                )
            return None
        return Detokenizer(self._tokenizer, params, prompt)

    def _encode(self, prompt: Prompt | Sequence[Message]) -> list[int]:
        if is_conversation(prompt):
            return self._chat_prompt(cast(Sequence[Message], prompt))
        if not isinstance(prompt, str):
            return token_ids_of(prompt)
        if self._tokenizer is None:
            raise ValueError(f"{self._missing}: give token ids, or pass a tokenizer")
        if not prompt:
            raise ValueError("the prompt is empty: expected at least one character")
        self._check_length(prompt)
        try:
            ids: list[int] = self._tokenizer(prompt)["input_ids"]
        except Exception as error:  # the tokenizer's own, such as of half a surrogate pair
            raise ValueError(
                f"the tokenizer refuses the prompt: {type(error).__name__}: {error}"
            ) from error
        return ids

    def _check_length(self, text: str) -> None:
        """Refuse a text that is far too long, from its first characters: to tokenise all of it may take minutes.

        The tokens of a beginning are those of the text, but for the last few. That they are many more than fit decides;
        how many characters a token covers is not known, since a tokenizer may leave out or join any number of them.
        """
        size, limit = _CHARACTERS_PER_TOKEN * self._max_model_len, 2 * self._max_model_len
        while size < len(text):
            assert self._tokenizer is not None
            count = len(self._tokenizer(text[:size])["input_ids"])
            if count > limit:
                raise ValueError(
                    f"the prompt has {len(text)} characters, and its first {size} are {count} tokens already, which "
                    f"limits.max_model_len={self._max_model_len} leaves no answer to: shorten it or raise the limit"
                )
            size *= 4

    def _chat_prompt(self, conversation: Sequence[Message]) -> list[int]:
        if self._tokenizer is None:
            raise ValueError(
                f"chat needs a tokenizer, and {self._missing}: pass one, or use generate() with token ids"
            )
        if not self._tokenizer.chat_template:
            raise ValueError(
                "chat needs a tokenizer with a chat template: use generate() with a prompt of your own making"
            )
        for message in conversation:
            check_message(message)
        if (
            sum(len(str(message["content"])) for message in conversation)
            > _CHARACTERS_PER_TOKEN * self._max_model_len
        ):
            self._check_length(str(self._apply_template(conversation, tokenize=False)))
        templated = self._apply_template(conversation, return_dict=True)
        ids: list[int] = templated["input_ids"]
        return ids

    def _apply_template(self, conversation: Sequence[Message], **options: Any) -> Any:
        """What the chat template makes of a conversation; raises ValueError."""
        assert self._tokenizer is not None
        try:
            return self._tokenizer.apply_chat_template(
                list(conversation), add_generation_prompt=True, **options
            )
        except (
            Exception
        ) as error:  # what a template refuses, such as two messages of one role in a row
            raise ValueError(f"the chat template refuses the messages: {error}") from error

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        """Each word as it stands at the beginning of a text, and as it follows a space."""
        if params.bad_words and self._tokenizer is None:
            raise ValueError(
                f"bad_words need a tokenizer, and {self._missing}: pass one, or use logit_bias"
            )
        words: dict[tuple[int, ...], None] = {}
        for word in params.bad_words:
            for text in (word, " " + word.lstrip()):
                assert self._tokenizer is not None
                words[tuple(self._tokenizer.encode(text, add_special_tokens=False))] = None
        return [list(word) for word in words if word]


def raise_failure(request: Request) -> None:
    """Raise RequestFailedError if something ended the request before its time: who only sees text sees no `error`."""
    if request.error is not None:
        raise RequestFailedError(
            f"the request ended with {request.finish_reason!r}: {request.error}"
        )


def _metrics(request: Request) -> RequestMetrics:
    times, begin = request.timings, request.timings.arrived

    def since(moment: float | None) -> float | None:
        return None if moment is None else moment - begin

    between = None
    if (
        times.first_token is not None
        and times.last_token is not None
        and len(request.token_ids) > 1
    ):
        between = (times.last_token - times.first_token) / (len(request.token_ids) - 1)
    return RequestMetrics(
        queue=since(times.scheduled),
        time_to_first_token=since(times.first_token),
        time_per_output_token=between,
        total=since(times.last_token),
    )


def _eos_token_ids(
    tokenizer: PreTrainedTokenizerBase | None, config: GenerationConfig | None
) -> frozenset[int]:
    ids = getattr(config, "eos_token_id", None)
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(
        token for token in [*listed, getattr(tokenizer, "eos_token_id", None)] if token is not None
    )
