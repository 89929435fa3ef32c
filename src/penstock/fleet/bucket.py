"""A token bucket: so much a minute, a minute's worth at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a bucket holds at a moment.

    Attributes:
        limit: what it can hold.
        remaining: whole ones that can be taken.
        full_after: seconds until it is full again.
    """

    limit: int
    remaining: int
    full_after: float


class Bucket:
    """Holds a minute's worth and fills evenly. It may hold less than nothing, if more was used than was foreseen.

    Args:
        per_minute: of whatever is counted; it starts full.
    """

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self.level = float(per_minute)
        self._at = now

    def wait(self, amount: float, now: float) -> float:
        """Seconds until ``amount`` can be taken; 0 if it can be now. More than it ever holds counts as all it holds."""
        self._fill(now)
        missing = min(amount, self.per_minute) - self.level
        return max(0.0, missing * 60.0 / self.per_minute)

    def take(self, amount: float, now: float) -> None:
        """A negative amount is given back."""
        self._fill(now)
        self.level = min(self.level - amount, float(self.per_minute))

    def resize(self, per_minute: int, now: float) -> None:
        """What has been used stays used."""
        self._fill(now)
        self.level += per_minute - self.per_minute
        self.per_minute = per_minute

    def allowance(self, now: float) -> Allowance:
        self._fill(now)
        missing = self.per_minute - self.level
        return Allowance(self.per_minute, max(0, int(self.level)), missing * 60.0 / self.per_minute)

    def _fill(self, now: float) -> None:
        if now > self._at:  # clocks of several threads may be read out of order
            self.level = min(self.level + (now - self._at) * self.per_minute / 60.0, float(self.per_minute))
            self._at = now
