"""The instruction set of this machine's processor, which C++ compiled with `-march=native` depends on."""

import hashlib
import platform
from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_FEATURES = ("flags", "features")  # of x86 and of ARM


@cache
def instruction_set() -> str:
    """A digest of all features that the processor reports, in 12 hexadecimal digits.

    All of them count, not only those that compilers are known to use: code with an instruction that is missing here ends the
    process, while a difference that does not matter costs a compilation.
    """
    return hashlib.sha256(" ".join(sorted(_features())).encode()).hexdigest()[:12]


def _features() -> set[str]:
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:  # not Linux
        return {platform.processor(), platform.node()}  # and what was compiled here stays here
    pairs = (line.partition(":") for line in lines)
    return {
        feature
        for name, _, found in pairs
        if name.strip().lower() in _FEATURES
        for feature in found.split()
    }
