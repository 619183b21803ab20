"""Token ids to text as they come: never a part of a character, and cut at the first stop string."""

from collections.abc import Callable, Sequence
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from compiled_llm.engine.unknown_tokens import is_unknown, raise_panic
from compiled_llm.sampling_params import SamplingParams

Decode = Callable[[list[int]], str]

_REPLACEMENT = "\ufffd"
_NUM_PRIMING_TOKENS = 8
_MAX_DECODED_TOKENS = 64  # at once, with each new token, where the tokenizer cannot stream
_MAX_INCOMPLETE_TOKENS = 3  # a UTF-8 character has four bytes at most


class Detokenizer:
    """The text of one completion.

    The text is what its tokens add to the prompt's, so a sentencepiece tokenizer keeps the space before the first word.
    A character that is incomplete at the end of the prompt belongs to the completion; one at the end of the completion
    is left out. Of several stop strings the one that ends first counts, and the longest of those that end together, so
    the result does not depend on how the text falls into tokens. An exception of the tokenizer is the caller's.

    Args:
        tokenizer: of the model.
        params: `stop`, `include_stop_str_in_output`, `min_tokens` and `skip_special_tokens` are read. A stop string
            counts if it ends after the first `min_tokens` tokens.
        prompt_token_ids: what the completion goes on from.

    Attributes:
        num_tokens: how many tokens the text has taken, the one that completed a stop string being the last.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
    ) -> None:
        self._stops, self._min_tokens = tuple(params.stop or ()), params.min_tokens
        self._longest_held = max(map(len, self._stops), default=1) - 1
        self._firsts = {stop[0] for stop in self._stops}
        self._include_stop = params.include_stop_str_in_output
        last = list(prompt_token_ids[-_NUM_PRIMING_TOKENS:])
        self._stream, self._stale = _open_stream(tokenizer, params.skip_special_tokens, last)
        self._text, self._taken, self._stopped = "", 0, False
        self.num_tokens = 0

    @property
    def text(self) -> str:
        """All text so far, of complete characters."""
        return self._text

    def push(self, token_ids: Sequence[int]) -> bool:
        """Take the next tokens; True once a stop string was found, and what comes after its token is ignored."""
        for token in token_ids:
            if self._stopped:
                break
            self.num_tokens += 1
            try:
                new = self._fresh(self._stream.step(token))
            except BaseException as error:
                raise_panic(error)
                raise
            self._text += new
            if new and self.num_tokens > self._min_tokens:
                self._stopped = self._cut(len(new))
        return self._stopped

    def take(self, *, final: bool = False) -> str:
        """The text since the last call, without what may become a stop string unless it is `final`."""
        held = 0 if final or self._stopped or self._include_stop else self._num_held()
        start, self._taken = self._taken, len(self._text) - held
        return self._text[start : self._taken]

    def _fresh(self, text: str) -> str:
        """The first text may begin with marks of the prompt's incomplete character, which are not the completion's."""
        if text and self._stale:
            marks = len(text) - len(text.lstrip(_REPLACEMENT))
            text, self._stale = text[min(self._stale, marks) :], 0
        return text

    def _cut(self, num_new: int) -> bool:
        """Cut the text at a stop string that ends in its last `num_new` characters, if there is one."""
        seen, found = len(self._text) - num_new, []
        for stop in self._stops:
            start = self._text.find(stop, max(0, seen - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start))
        if found:
            end, start = min(found)
            self._text = self._text[: end if self._include_stop else start]
        return bool(found)

    def _num_held(self) -> int:
        """How many characters at the end begin a stop string."""
        tail = self._text[-self._longest_held :] if self._longest_held else ""
        for start, character in enumerate(tail):
            if character in self._firsts and self._begins_stop(tail[start:]):
                return len(tail) - start
        return 0

    def _begins_stop(self, text: str) -> bool:
        return any(stop.startswith(text) and stop != text for stop in self._stops)


class _Stream(Protocol):
    def step(self, token: int) -> str:
        """The text that the token completes."""


class _FastStream:
    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, context: list[int]) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._stream = DecodeStream(ids=context, skip_special_tokens=skip_special_tokens)

    def step(self, token: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception as error:  # the library raises nothing more precise
            if not str(error).startswith("Invalid prefix encountered"):
                raise
            # Bytes that are no UTF-8 undid text already given (byte fallback decodes a run of them as a whole): leave them out.
            self._stream = DecodeStream(skip_special_tokens=self._skip)
            return self._stream.step(self._tokenizer, token) or ""


class _SlowStream:
    """Decodes the last tokens again with each new one; tokens that the tokenizer does not know have no text."""

    def __init__(self, decode: Decode, knows: Callable[[int], bool], context: list[int]) -> None:
        self._decode, self._knows, self._ids = decode, knows, list(context)
        self._num_given = len(decode(context)) if context else 0

    def step(self, token: int) -> str:
        try:
            text = self._decode([*self._ids, token])
        except Exception:
            if self._knows(token):
                raise
            return ""
        self._ids.append(token)
        if text.endswith(_REPLACEMENT):
            return ""
        start, self._num_given = self._num_given, max(self._num_given, len(text))
        if len(self._ids) >= _MAX_DECODED_TOKENS:
            self._shorten(text)
        return text[start:]

    def _shorten(self, text: str) -> None:
        """Go on from the last tokens alone, where these decode to the end of the text."""
        ids = self._ids[-_NUM_PRIMING_TOKENS:]
        end = self._decode(ids)
        if end and text.endswith(end) and self._num_given == len(text):
            self._ids, self._num_given = ids, len(end)


def _open_stream(
    tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool, prompt: list[int]
) -> tuple[_Stream, int]:
    """A stream that goes on from the end of a prompt, and how many replacement characters stand for the prompt's last bytes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)

    def decode(ids: list[int]) -> str:
        if backend is not None:
            return str(backend.decode(ids, skip_special_tokens=skip_special_tokens))
        return str(
            tokenizer.decode(
                ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def knows(token: int) -> bool:
        try:
            decode([token])
        except Exception as error:
            return not is_unknown(tokenizer, token, error)
        return True

    last = [token for token in prompt if backend is not None or knows(token)]
    context, incomplete = _whole_characters(last, decode)
    stream = (
        _SlowStream(decode, knows, context)
        if backend is None
        else _FastStream(backend, skip_special_tokens, context)
    )
    for token in incomplete:
        stream.step(token)  # gives nothing: no character is complete
    marked = decode(context + incomplete) if incomplete else ""
    return stream, len(marked) - len(marked.rstrip(_REPLACEMENT))


def _whole_characters(tokens: list[int], decode: Decode) -> tuple[list[int], list[int]]:
    """The longest run of tokens that neither begins nor ends within a character, and the few tokens after it.

    A stream primed with an incomplete end would give the prompt's text again, and one primed with an incomplete
    beginning would, with byte fallback, not decode the bytes that follow.
    """
    for end in range(len(tokens), max(len(tokens) - _MAX_INCOMPLETE_TOKENS - 1, 0), -1):
        for start in range(end):
            text = decode(tokens[start:end])
            if not text.startswith(_REPLACEMENT) and not text.endswith(_REPLACEMENT):
                return tokens[start:end], tokens[end:]
    return [], []
