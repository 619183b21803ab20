"""Analysis of profiles: calls that launch device work, and the device's busy and idle time."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

# Begin and end in microseconds since the first span's begin, and the correlation id of the launch.
Span = tuple[float, float, int]
_LAUNCHES = ("cudaGraphLaunch", "cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpy", "cudaMemset")


def count_launches(names: Iterable[str]) -> dict[str, int]:
    """Return the number of launches of each kind among the names of a profile's events."""
    counts = Counter(kind for name in names for kind in _LAUNCHES if name.startswith(kind))
    return dict(counts)


def device_spans(events: Iterable[Any]) -> list[Span]:
    """Return the kernels and copies among a profile's events, ordered by begin."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]

    cuda = DeviceType.CUDA
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.correlation_id())
        for event in events
        if event.device_type() == cuda and event.duration_ns()
    )
    origin = spans[0][0] if spans else 0
    return [((begin - origin) / 1e3, (end - origin) / 1e3, launch) for begin, end, launch in spans]


def busy_us(spans: Sequence[Span]) -> float:
    """Return the microseconds in which at least one span runs."""
    busy = 0.0
    reached = float("-inf")
    for begin, end, _ in sorted(spans):
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return busy


def idle_between_launches(spans: Sequence[Span]) -> float | None:
    """Return the share of the profiled time that lies between two launches' spans.

    Gaps within a launch, such as those between kernels of one graph, do not count. Returns None
    without spans.
    """
    bounds: dict[int, tuple[float, float]] = {}
    for begin, end, launch in spans:
        first, last = bounds.get(launch, (begin, end))
        bounds[launch] = (min(first, begin), max(last, end))
    whole = [(begin, end, 0) for begin, end in bounds.values()]
    if not whole:
        return None
    total = max(end for _, end, _ in whole) - min(begin for begin, _, _ in whole)
    return 1 - busy_us(whole) / total if total else None
