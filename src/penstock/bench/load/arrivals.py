"""When requests arrive. Everything is a function of the seed, so that a run can be had again."""

from __future__ import annotations

import itertools
import random


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds of so many arrivals, from 0 upwards, whose intervals are drawn from a Gamma distribution.

    Another rate stretches the same pattern: two rates under one seed differ in nothing else.

    Args:
        rate: arrivals a second in the long run; infinite for all at once.
        burstiness: the shape of the distribution. 1 is a Poisson process; below it arrivals come in bursts (the
            intervals' coefficient of variation is 1 / sqrt(burstiness)); above it they come more evenly.
    """
    rng = random.Random(f"arrivals {seed}")
    intervals = (rng.gammavariate(burstiness, 1 / burstiness) / rate for _ in range(count))
    return list(itertools.accumulate(intervals))
