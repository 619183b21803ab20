"""Errors of tokenizers: ids that a tokenizer has no text for, and panics of its Rust code."""

from typing import Any


def is_unknown(tokenizer: Any, token: int, error: Exception) -> bool:
    """Return whether decoding a single token failed because the tokenizer does not know its id.

    A model's vocabulary is often padded beyond the tokenizer's, and some tokenizers, such as sentencepiece, raise there.
    """
    try:
        size = len(tokenizer)
    except TypeError:  # not one of transformers' own
        return isinstance(error, LookupError)
    return isinstance(error, LookupError) or token >= size


def raise_panic(error: BaseException) -> None:
    """Raise a RuntimeError for a panic in Rust code, which is not an `Exception`, so that it ends one request alone."""
    if type(error).__module__ == "pyo3_runtime":
        raise RuntimeError(f"the tokenizer failed: {error}") from error
