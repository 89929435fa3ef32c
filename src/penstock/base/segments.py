"""How the inputs of a row-parallel linear are cut, so that its sums are the same at every tensor-parallel degree."""

from __future__ import annotations

MAX_SEGMENTS = 8
"""Most segments S into which a row-parallel linear splits K, so the largest tensor-parallel degree of a model."""

SUM_GROUP = 32
"""Elements of the feed-forward width that stay in one segment of the down projection, where 32 divides it."""


def sum_segments(units: int) -> int:
    """S: the largest power of two <= MAX_SEGMENTS that divides ``units``, the parts of K that stay whole."""
    segments = MAX_SEGMENTS
    while units % segments:
        segments //= 2
    return segments


def ffn_segments(ffn: int) -> int:
    """S of a down projection."""
    return sum_segments(ffn if ffn % SUM_GROUP else ffn // SUM_GROUP)
