"""How long this package took to import; the package imports this module first, and calls `done` last.

To import makes a million objects that stay. To look through them for garbage takes a sixth of the time, and a quarter of a second
whenever all objects are looked through later. So nothing is collected meanwhile, and what is there in the end is left out of
later collections; but not where torch was there before, since then a user's models may be too, and they must go when they are let
go of.
"""

import gc
import sys
import time

_BEGAN = time.perf_counter()
_alone = "torch" not in sys.modules and gc.isenabled()
_seconds = 0.0

if _alone:
    gc.disable()


def done() -> None:
    """The package is there."""
    global _seconds
    _seconds = time.perf_counter() - _BEGAN
    if _alone:
        gc.freeze()
        gc.enable()


def seconds() -> float:
    """What it took in this process, with all that was not imported before, such as torch."""
    return _seconds
