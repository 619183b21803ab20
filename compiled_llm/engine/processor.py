"""Conversion of prompts to requests."""

import secrets
from collections.abc import Sequence

from transformers import GenerationConfig, PreTrainedTokenizerBase

from compiled_llm.engine.detokenizer import Detokenizer
from compiled_llm.engine.output_builder import RequestGroup
from compiled_llm.engine.prompt_tokenizer import PromptTokenizer
from compiled_llm.engine.prompts import Message, Prompt, list_for_each
from compiled_llm.engine.request import Request
from compiled_llm.sampling_params import SamplingParams

_MAX_SEED = 2**63 - 1


class RequestProcessor:
    """Makes requests for one model.

    Args:
        tokenizer: the model's tokenizer, if it has one.
        generation_config: the checkpoint's generation config; it gives the default sampling
            parameters and the end-of-sequence tokens.
        max_model_len: tokens of a prompt and its completion at most.
        tokenizer_failure: why the model's tokenizer could not be loaded, for error messages.

    Attributes:
        default_sampling_params: sampling parameters of requests without any.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        generation_config: GenerationConfig | None,
        *,
        max_model_len: int,
        tokenizer_failure: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._prompts = PromptTokenizer(
            tokenizer, max_model_len=max_model_len, failure=tokenizer_failure
        )
        self.default_sampling_params = SamplingParams.from_generation_config(generation_config)
        self._eos_token_ids = _eos_token_ids(tokenizer, generation_config)

    def process(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        streaming: bool = False,
        request_id: str | None = None,
    ) -> RequestGroup:
        """Return the requests of a prompt; the engine has not validated them yet.

        Args:
            prompt: text, token ids or a conversation.
            sampling_params: `default_sampling_params` if None.
            priority: lower numbers are scheduled first.
            streaming: whether tokens and text are updated after each step.
            request_id: name of the group.

        Raises:
            ValueError: an argument is not valid, or the prompt cannot be tokenized.
        """
        params = self.default_sampling_params if sampling_params is None else sampling_params
        _check_arguments(params, priority, request_id)
        prompt_token_ids = self._prompts.encode(prompt)
        bad_words = self._prompts.encode_bad_words(params.bad_words)
        seed = secrets.randbits(62) if params.seed is None else params.seed
        requests = [
            Request(
                prompt_token_ids=prompt_token_ids,
                sampling_params=params,
                seed=(seed + number) & _MAX_SEED,
                max_tokens=self._max_tokens(params, len(prompt_token_ids)),
                stop_token_ids=self._stop_token_ids(params),
                bad_words=bad_words,
                priority=priority,
                streaming=streaming,
            )
            for number in range(params.n)
        ]
        for request in requests:
            self._add_detokenizer(request)
        text = prompt if isinstance(prompt, str) else None
        return RequestGroup(prompt=text, requests=requests, request_id=request_id)

    def check_stream(self, sampling_params: SamplingParams | None) -> None:
        """Raise ValueError unless a request with these parameters can be streamed as text."""
        self._prompts.require("stream() yields text, which needs", "use generate()")
        if sampling_params is not None and sampling_params.n > 1:
            raise ValueError(
                f"stream() yields one completion, got n={sampling_params.n}: use generate()"
            )

    def _max_tokens(self, params: SamplingParams, num_prompt_tokens: int) -> int:
        # At least 1, so that the validation of the request reports the length of the prompt.
        within_limit = max(1, self._max_model_len - num_prompt_tokens)
        return min(params.max_tokens or self._max_model_len, within_limit)

    def _stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        given = frozenset(params.stop_token_ids)
        return given if params.ignore_eos else given | self._eos_token_ids

    def _add_detokenizer(self, request: Request) -> None:
        """Give the request a detokenizer if its text is needed before it ends."""
        params = request.sampling_params
        if params.stop:
            self._prompts.require("stop strings need", "use stop_token_ids")
        if self._tokenizer is not None and (request.streaming or params.stop):
            request.detokenizer = Detokenizer(
                self._tokenizer, params, request.prompt_token_ids, request.stop_token_ids
            )


def expand_arguments(
    count: int,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    priority: Sequence[int] | None,
) -> tuple[list[SamplingParams | None], list[int]]:
    """Return the sampling parameters and the priority of each of `count` prompts.

    Raises:
        ValueError: a list has another length.
    """
    params: list[SamplingParams | None]
    if isinstance(sampling_params, SamplingParams | None):
        params = [sampling_params] * count
    else:
        params = list_for_each(sampling_params, count, "sampling params")
    if priority is None:
        return params, [0] * count
    return params, list_for_each(priority, count, "priorities")


def _check_arguments(params: object, priority: object, request_id: object) -> None:
    if not isinstance(params, SamplingParams):
        got = type(params).__name__
        raise ValueError(f"sampling_params must be SamplingParams, got {got}")
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise ValueError(f"priority must be a whole number, got {priority!r}")
    if not isinstance(request_id, str | None):
        raise ValueError(f"request_id must be text or None, got {request_id!r}")


def _eos_token_ids(
    tokenizer: PreTrainedTokenizerBase | None, config: GenerationConfig | None
) -> frozenset[int]:
    ids = getattr(config, "eos_token_id", None)
    listed = ids if isinstance(ids, list) else [ids]
    found = [*listed, getattr(tokenizer, "eos_token_id", None)]
    return frozenset(token for token in found if token is not None)
