"""Sampling parameters; their names, meaning and defaults are those of vLLM."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from compiled_llm.config.schema import Sampler

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

LogitsProcessor = Callable[["torch.LongTensor", "torch.FloatTensor"], "torch.FloatTensor"]

MAX_LOGPROBS = 20  # of one token, besides the sampled token's own

_GENERATION_CONFIG_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_MAX_SEED = 2**63 - 1
_MAX_INT = 2**31 - 1
_MAX_FLOAT = (2 - 2**-23) * 2.0**127  # of float32, as torch.finfo has it
_MIN_FLOAT = 2.0**-126
_MAX_BIAS = 100.0
_MAX_N = 16_384  # each completion is a request, and all are made before the first one runs


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request.

    Lists are stored as tuples, and a single stop string as a tuple of one.

    Args:
        n: number of completions; more than one needs a temperature above 0.
        temperature: divisor of the logits; 0 for greedy sampling.
        top_k: sample from this many of the most likely tokens; 0 or -1 for all of them.
        top_p: sample from the fewest most likely tokens whose probabilities add up to this.
        min_p: sample from tokens with at least this probability, relative to the most likely one.
        presence_penalty: subtracted from the logits of generated tokens.
        frequency_penalty: subtracted from the logits of generated tokens for each occurrence.
        repetition_penalty: divides positive and multiplies negative logits of tokens of the prompt
            and the completion.
        seed: makes the sampled tokens independent of other requests; None for a random seed.
        max_tokens: number of tokens to generate at most; None for the model's length limit.
        min_tokens: number of tokens before which no stop token or stop string ends the request.
        stop: strings that end the request; the text is cut before them.
        stop_token_ids: token ids that end the request, besides the model's end of sequence.
        ignore_eos: continue after the model's end of sequence.
        include_stop_str_in_output: cut the text after the stop string instead of before it.
        skip_special_tokens: leave special tokens out of the text.
        logprobs: number of most likely tokens whose log-probabilities are returned with that of
            each generated token; None for no log-probabilities.
        prompt_logprobs: the same for each token of the prompt.
        logit_bias: added to the logits of these token ids; clamped to the range from -100 to 100.
        allowed_token_ids: the only token ids that may be generated; None for all.
        bad_words: texts that are not generated.
        logits_processors: functions from the token ids so far, [1, L], and the logits, [1, V], to
            new logits, such as transformers' `LogitsProcessor` objects.

    Raises:
        ValueError: a value is out of range; the message gives the field, the range and the value.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    logits_processors: Sequence[LogitsProcessor] = ()

    def __post_init__(self) -> None:
        self._check_whole_numbers()
        self._check_real_numbers()
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            _require(
                isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name)
            )
        self._normalise()
        _require(self.n == 1 or self.temperature > 0, "n", "1 when temperature is 0", self.n)
        limit = self.max_tokens
        _require(
            limit is None or self.min_tokens <= limit,
            "min_tokens",
            f"at most max_tokens={limit}",
            self.min_tokens,
        )

    @classmethod
    def from_generation_config(cls, config: "GenerationConfig | None", **overrides: Any) -> Self:
        """Return the parameters of a checkpoint's generation config.

        The config holds None where the checkpoint sets nothing; the defaults of this class apply
        there, rather than those of transformers.

        Args:
            config: the generation config, if there is one.
            overrides: parameters that take precedence.
        """
        found = {name: getattr(config, name, None) for name in _GENERATION_CONFIG_FIELDS}
        found["max_tokens"] = getattr(config, "max_new_tokens", None)
        if getattr(config, "do_sample", None) is False:
            found["temperature"] = 0.0
        given = {name: value for name, value in found.items() if value is not None}
        return cls(**{**given, **overrides})

    @property
    def sampler(self) -> Sampler:
        """The cheapest sampler of the graph that serves these, apart from `prompt_logprobs`."""
        truncates = self.temperature > 0 and (self.top_k != 0 or self.top_p < 1 or self.min_p > 0)
        penalises = (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )
        forbids = self.allowed_token_ids or self.bad_words or self.min_tokens > 0
        if (
            truncates
            or penalises
            or forbids
            or self.logit_bias
            or self.logits_processors
            or self.logprobs is not None
        ):
            return "full"
        return "random" if self.temperature > 0 else "greedy"

    def _check_whole_numbers(self) -> None:
        for name, low, high in (
            ("n", 1, _MAX_N),
            ("top_k", -1, _MAX_INT),
            ("seed", 0, _MAX_SEED),
            ("max_tokens", 1, _MAX_INT),
            ("min_tokens", 0, _MAX_INT),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
        ):
            value = getattr(self, name)
            optional = name in ("seed", "max_tokens", "logprobs", "prompt_logprobs")
            fits = (value is None and optional) or _is_whole(value, low, high)
            _require(
                fits,
                name,
                f"a whole number from {low} to {high}{' or None' if optional else ''}",
                value,
            )

    def _check_real_numbers(self) -> None:
        for name, low, high, expected in (
            ("temperature", 0, _MAX_FLOAT, "at least 0, and finite in float32"),
            ("top_p", _MIN_FLOAT, 1, "above 0 and at most 1"),
            ("min_p", 0, 1, "from 0 to 1"),
            ("presence_penalty", -2, 2, "from -2 to 2"),
            ("frequency_penalty", -2, 2, "from -2 to 2"),
            ("repetition_penalty", _MIN_FLOAT, _MAX_FLOAT, "above 0, and finite in float32"),
        ):
            value = getattr(self, name)
            _require(_is_real(value) and low <= value <= high, name, f"a number {expected}", value)

    def _normalise(self) -> None:
        stop = (
            (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        )
        allowed = self.allowed_token_ids
        values: dict[str, object] = {
            "top_k": max(self.top_k, 0),
            "stop": _tuple("stop", stop, "a text or a list of texts, none of them empty", _is_text),
            "stop_token_ids": _tuple(
                "stop_token_ids", self.stop_token_ids, "a list of token ids", _is_token_id
            ),
            "bad_words": _tuple(
                "bad_words", self.bad_words, "a list of texts, none of them empty", _is_text
            ),
            "logits_processors": _tuple(
                "logits_processors", self.logits_processors, "a list of callables", callable
            ),
        }
        if allowed is not None:
            expected = "a list of at least one token id, or None"
            values["allowed_token_ids"] = _tuple(
                "allowed_token_ids", allowed, expected, _is_token_id
            )
            _require(len(allowed) > 0, "allowed_token_ids", expected, allowed)
        if self.logit_bias is not None:
            values["logit_bias"] = _clamped(self.logit_bias)
        for name, value in values.items():
            object.__setattr__(self, name, value)


def _require(fits: bool, name: str, expected: str, got: object) -> None:
    if not fits:
        raise ValueError(f"{name} must be {expected}, got {got!r}")


def _tuple(
    name: str, values: Any, expected: str, fits: Callable[[object], bool]
) -> tuple[Any, ...]:
    listed = isinstance(values, Sequence) and not isinstance(
        values, str | bytes | bytearray | memoryview
    )
    _require(listed and all(fits(value) for value in values), name, expected, values)
    return tuple(values)


def _clamped(bias: Any) -> dict[int, float]:
    fits = isinstance(bias, Mapping) and all(
        _is_token_id(key) and _is_real(value) for key, value in bias.items()
    )
    _require(fits, "logit_bias", "a dict of token ids to finite numbers", bias)
    return {token: max(-_MAX_BIAS, min(_MAX_BIAS, value)) for token, value in bias.items()}


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_real(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -_MAX_FLOAT <= value <= _MAX_FLOAT
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_token_id(value: object) -> bool:
    return _is_whole(value, 0, _MAX_INT)
