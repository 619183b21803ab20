"""How long this package took to import; the package imports this module first, and calls `done` last."""

import time

_BEGAN = time.perf_counter()
_seconds = 0.0


def done() -> None:
    """The package is there."""
    global _seconds
    _seconds = time.perf_counter() - _BEGAN


def seconds() -> float:
    """What it took in this process, with all that was not imported before, such as torch."""
    return _seconds
