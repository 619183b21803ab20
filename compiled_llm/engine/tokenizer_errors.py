"""Errors of tokenizers: unknown token ids, and panics of their Rust code."""

from typing import Any


def is_unknown(tokenizer: Any, token: int, error: Exception) -> bool:
    """Return whether decoding a single token failed because the tokenizer does not know its id.

    The vocabulary of a model is often padded beyond the tokenizer's, and some tokenizers, such as
    sentencepiece, raise there.
    """
    try:
        size = len(tokenizer)
    except TypeError:  # not a tokenizer of transformers
        return isinstance(error, LookupError)
    return isinstance(error, LookupError) or token >= size


def raise_panic(error: BaseException) -> None:
    """Raise RuntimeError if `error` is a panic in Rust code, which is not an `Exception`.

    As an `Exception`, it ends one request only.
    """
    if type(error).__module__ == "pyo3_runtime":
        raise RuntimeError(f"the tokenizer failed: {error}") from error
