"""The instruction set of this machine's processor, for which `-march=native` compiles."""

import hashlib
import platform
from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_FEATURES = ("flags", "features")  # of x86 and of ARM


@cache
def instruction_set() -> str:
    """Return a digest of the features that the processor reports, in 12 hexadecimal digits.

    All features count, not only those that compilers are known to use: an instruction that this
    processor lacks ends the process, while an irrelevant difference costs one compilation.
    """
    return hashlib.sha256(" ".join(sorted(_features())).encode()).hexdigest()[:12]


def _features() -> set[str]:
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:  # not Linux: compiled code is not shared with other machines
        return {platform.processor(), platform.node()}
    pairs = (line.partition(":") for line in lines)
    return {
        feature
        for name, _, features in pairs
        if name.strip().lower() in _FEATURES
        for feature in features.split()
    }
