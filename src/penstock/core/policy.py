"""Who goes first. A policy gives each submission a place in line when it arrives, and the place never changes.

A fixed, total order is what makes the scheduler's promises provable: the first in line always progresses, so
nobody starves, and a preempted request cannot come back to preempt its preemptor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from penstock.base import Registry
from penstock.core.service import Submission


class SchedulingPolicy(Protocol):
    def place(self, submission: Submission, now: float) -> float:
        """Smaller goes first; ties go to the earlier arrival."""
        ...


class FirstCome:
    def place(self, submission: Submission, now: float) -> float:
        return now


class PriorityWithAgeing:
    """Priority that improves by one level for every ``age_seconds`` of waiting.

    All ages grow alike, so comparing ``priority - age / age_seconds`` at any moment is comparing
    ``arrival + priority * age_seconds``, which is fixed.
    """

    def __init__(self, age_seconds: float) -> None:
        self.age_seconds = age_seconds

    def place(self, submission: Submission, now: float) -> float:
        return now + submission.priority * self.age_seconds


policies: Registry[Callable[[float], SchedulingPolicy]] = Registry("scheduling policy")
policies.register("fcfs")(lambda age_seconds: FirstCome())
policies.register("priority")(PriorityWithAgeing)
