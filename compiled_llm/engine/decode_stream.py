"""Streams that decode one token at a time, with fast and slow tokenizers of transformers."""

from collections.abc import Callable, Sequence
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from compiled_llm.engine.tokenizer_errors import is_unknown

Decode = Callable[[list[int]], str]

_REPLACEMENT = "\ufffd"
_NUM_CONTEXT_TOKENS = 8
_MAX_DECODED_TOKENS = 64  # decoded again with each new token, if the tokenizer cannot stream
_MAX_INCOMPLETE_TOKENS = 3  # a UTF-8 character has at most four bytes


class TokenStream(Protocol):
    """Decodes one token at a time."""

    def step(self, token: int) -> str:
        """Return the text that the token completes, which may be empty."""


def open_stream(
    tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool, prompt: Sequence[int]
) -> tuple[TokenStream, int]:
    """Return a stream that continues a prompt.

    Returns:
        The stream, and how many replacement characters at the beginning of its first text stand
        for the last bytes of the prompt.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)

    def decode(ids: list[int]) -> str:
        if backend is not None:
            return str(backend.decode(ids, skip_special_tokens=skip_special_tokens))
        text = tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return str(text)

    def is_known(token: int) -> bool:
        try:
            decode([token])
        except Exception as error:
            return not is_unknown(tokenizer, token, error)
        return True

    last = prompt[-_NUM_CONTEXT_TOKENS:]
    known = [token for token in last if backend is not None or is_known(token)]
    context, incomplete = _split_at_character(known, decode)
    stream: TokenStream
    if backend is None:
        stream = _SlowStream(decode, is_known, context)
    else:
        stream = _FastStream(backend, skip_special_tokens, context)
    for token in incomplete:
        stream.step(token)  # returns nothing, because no character is complete
    marked = decode(context + incomplete) if incomplete else ""
    return stream, len(marked) - len(marked.rstrip(_REPLACEMENT))


def strip_marks(text: str, count: int) -> str:
    """Remove up to `count` replacement characters from the beginning of a text."""
    num_marks = len(text) - len(text.lstrip(_REPLACEMENT))
    return text[min(count, num_marks) :]


class _FastStream:
    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream = DecodeStream(ids=context, skip_special_tokens=skip_special_tokens)

    def step(self, token: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception as error:  # the library raises no more specific type
            if not str(error).startswith("Invalid prefix encountered"):
                raise
            # Bytes that are not valid UTF-8 change text that was returned before, because byte
            # fallback decodes a run of bytes as a whole. They are left out.
            self._stream = DecodeStream(skip_special_tokens=self._skip)
            return self._stream.step(self._tokenizer, token) or ""


class _SlowStream:
    """Decodes the last tokens again with each new one; unknown tokens have no text."""

    def __init__(self, decode: Decode, is_known: Callable[[int], bool], context: list[int]) -> None:
        self._decode = decode
        self._is_known = is_known
        self._ids = list(context)
        self._num_returned = len(decode(context)) if context else 0

    def step(self, token: int) -> str:
        try:
            text = self._decode([*self._ids, token])
        except Exception:
            if self._is_known(token):
                raise
            return ""
        self._ids.append(token)
        if text.endswith(_REPLACEMENT):
            return ""
        start, self._num_returned = self._num_returned, max(self._num_returned, len(text))
        if len(self._ids) >= _MAX_DECODED_TOKENS:
            self._shorten(text)
        return text[start:]

    def _shorten(self, text: str) -> None:
        """Keep the last tokens only, if they decode to the end of the text."""
        ids = self._ids[-_NUM_CONTEXT_TOKENS:]
        end = self._decode(ids)
        if end and text.endswith(end) and self._num_returned == len(text):
            self._ids = ids
            self._num_returned = len(end)


def _split_at_character(tokens: list[int], decode: Decode) -> tuple[list[int], list[int]]:
    """Return the longest run of tokens of complete characters, and the few tokens after it.

    A stream whose context ends within a character would return text of the prompt again. With byte
    fallback, a stream whose context begins within a character would not decode the next bytes.
    """
    for end in range(len(tokens), max(len(tokens) - _MAX_INCOMPLETE_TOKENS - 1, 0), -1):
        for start in range(end):
            text = decode(tokens[start:end])
            if not text.startswith(_REPLACEMENT) and not text.endswith(_REPLACEMENT):
                return tokens[start:end], tokens[end:]
    return [], []
