"""The largest rate that meets its limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Found:
    """Attributes:
    rate: the largest that passed, twice where it could be confirmed; 0 if none did.
    failed: the smallest above it that did not; None if all passed.
    probes: (rate, passed) in order.
    confirmed: a second run at ``rate``, with other arrivals, passed as well.
    """

    rate: float
    failed: float | None
    probes: tuple[tuple[float, bool], ...]
    confirmed: bool


def largest_rate(
    passes: Callable[[float, int], bool], start: float, *, tolerance: float = 0.05, probes: int = 24
) -> Found:
    """Doubles or halves until the answer changes, halves the interval (in logarithms) until its ends are within the
    tolerance, then confirms with another seed. A rate that is not confirmed was luck: it becomes the upper end, and the
    search goes on a tolerance lower.

    Args:
        passes: measures at a rate, with this number as part of its seed.
        start: where to begin, such as the rate of the offline run.
        tolerance: largest ratio of the ends, minus 1.
        probes: most measurements.
    """
    seen: list[tuple[float, bool]] = []

    def probe(rate: float, attempt: int) -> bool:
        seen.append((rate, passes(rate, attempt)))
        return seen[-1][1]

    low, high, rate = 0.0, None, start
    while len(seen) < probes - 1 and (high is None or low == 0 or high / low > 1 + tolerance):
        if probe(rate, 0):
            low = rate
        else:
            high = rate
        if high is None:
            rate = low * 2
        elif low == 0:
            rate = high / 2
        else:
            rate = (low * high) ** 0.5
    again = probe(low, 1) if low else True
    while not again and len(seen) < probes - 1:
        high, low = low, low / (1 + tolerance)
        again = probe(low, 0) and probe(low, 1)
    return Found(low, high, tuple(seen), bool(low) and again)
