"""What a profile says of a step: calls that give the device work, and the time in which it has none."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

# Begin and end in microseconds from the first span's begin, and the launch that it belongs to.
Span = tuple[float, float, int]
_LAUNCHES = ("cudaGraphLaunch", "cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpy", "cudaMemset")


def launches(names: Iterable[str]) -> dict[str, int]:
    """How often each kind of call gave the device work, by the names of a profile's events."""
    counts = Counter(kind for name in names for kind in _LAUNCHES if name.startswith(kind))
    return dict(counts)


def spans_of(events: Iterable[Any]) -> list[Span]:
    """The kernels and copies among a profile's events, by their begin."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]

    cuda = DeviceType.CUDA
    found = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.correlation_id())
        for event in events
        if event.device_type() == cuda and event.duration_ns()
    )
    origin = found[0][0] if found else 0
    return [((begin - origin) / 1e3, (end - origin) / 1e3, launch) for begin, end, launch in found]


def busy_us(spans: Sequence[Span]) -> float:
    """Microseconds in which at least one span runs."""
    busy, reached = 0.0, float("-inf")
    for begin, end, _ in sorted(spans):
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return busy


def idle_between_launches(spans: Sequence[Span]) -> float | None:
    """The share of time in which nothing runs between one launch's last span and the next one's first; None without spans."""
    bounds: dict[int, tuple[float, float]] = {}
    for begin, end, launch in spans:
        first, last = bounds.get(launch, (begin, end))
        bounds[launch] = (min(first, begin), max(last, end))
    whole = [(begin, end, 0) for begin, end in bounds.values()]
    if not whole:
        return None
    total = max(end for _, end, _ in whole) - min(begin for begin, _, _ in whole)
    return 1 - busy_us(whole) / total if total else None
