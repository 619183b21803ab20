"""The time that importing the library took, and the garbage collector meanwhile.

Importing torch and the library creates about a million objects that stay. Looking through them takes a sixth of the time, and a
quarter of a second in each full collection later. So the collector is off meanwhile, and what is there in the end is left out of
later collections; but not where torch was there before, since then a user's models may be too, and must be freed when dropped.
"""

import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_total_seconds = 0.0


@contextmanager
def importing() -> Iterator[None]:
    """Count the time of the imports in the body, with the garbage collector off; it is on again after an error, too."""
    global _total_seconds
    began, alone = time.perf_counter(), "torch" not in sys.modules and gc.isenabled()
    if alone:
        gc.disable()
    try:
        yield
        if alone:
            gc.freeze()
    finally:
        if alone:
            gc.enable()
        _total_seconds += time.perf_counter() - began


def seconds() -> float:
    """Return what the imports took in this process; torch counts where it was not imported before."""
    return _total_seconds
