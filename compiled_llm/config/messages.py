"""Parts of error messages that config and input errors share."""

import difflib
from collections.abc import Iterable


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about the unknown `name`: the nearest known name, or all."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {matches[0]!r}?" if matches else f": expected one of {', '.join(known)}"


def excerpt(value: object) -> str:
    """Return `repr(value)`, cut to 80 characters."""
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # Python prints no integer of more than 4,300 digits
        shown = f"a very large {type(value).__name__}"
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
