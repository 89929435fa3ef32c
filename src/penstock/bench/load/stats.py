"""Percentiles and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES, WORK = 1000, 40_000_000
"""Most resamples of a bootstrap, and most values drawn by one in all."""
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Of a quantity in seconds. A percentile is by nearest rank: the smallest of the values that at least so many
    percent of them do not exceed, so always a value that occurred.

    Attributes:
        n: values.
        mean_95, p50_95, p99_95: 95 % confidence intervals by bootstrap over requests; None with fewer than two.
    """

    n: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float
    mean_95: tuple[float, float] | None = None
    p50_95: tuple[float, float] | None = None
    p99_95: tuple[float, float] | None = None


def percentile(values: Sequence[float], percent: float) -> float:
    """By nearest rank; not a number of nothing."""
    if not len(values):
        return math.nan
    rank = max(1, math.ceil(percent * len(values) / 100))
    return float(np.partition(np.asarray(values, dtype=float), rank - 1)[rank - 1])


def spread(groups: Sequence[Sequence[float]], seed: int = 0) -> Spread | None:
    """Of values that come in groups, one for each request. None without a value.

    The bootstrap draws requests, not values: gaps of one stream resemble each other, and drawing them singly would
    make the interval too narrow.
    """
    kept = [group for group in groups if len(group)]
    if not kept:
        return None
    values = np.concatenate([np.asarray(group, dtype=float) for group in kept])
    owner = np.repeat(np.arange(len(kept)), [len(group) for group in kept])
    order = np.argsort(values, kind="stable")
    values, owner = values[order], owner[order]
    p50, p90, p95, p99 = (float(values[max(1, math.ceil(p * len(values) / 100)) - 1]) for p in (50, 90, 95, 99))
    sure = _bootstrap(values, owner, len(kept), seed) if len(kept) > 1 else {}
    return Spread(
        n=len(values),
        mean=float(values.mean()),
        p50=p50,
        p90=p90,
        p95=p95,
        p99=p99,
        max=float(values[-1]),
        mean_95=sure.get("mean"),
        p50_95=sure.get("p50"),
        p99_95=sure.get("p99"),
    )


def _bootstrap(values: np.ndarray, owner: np.ndarray, groups: int, seed: int) -> dict[str, tuple[float, float]]:
    """``values`` sorted, each of the group ``owner``."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {"mean": [], "p50": [], "p99": []}
    for _ in range(max(100, min(RESAMPLES, WORK // len(values)))):
        drawn = np.bincount(rng.integers(groups, size=groups), minlength=groups)[owner]
        below = np.cumsum(drawn)
        found["mean"].append(float((values * drawn).sum() / below[-1]))
        for name, share in (("p50", 0.50), ("p99", 0.99)):
            found[name].append(float(values[np.searchsorted(below, share * below[-1])]))
    tail = 100 * (1 - CONFIDENCE) / 2
    return {name: (percentile(each, tail), percentile(each, 100 - tail)) for name, each in found.items()}
