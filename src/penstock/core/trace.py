"""What an engine can tell of its last steps, of the requests in them, and of its KV blocks. No text and no token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from penstock.core.plan import Slice


@dataclass(slots=True, kw_only=True)
class StepTrace:
    """One step. Moments are seconds of the engine's monotonic clock, 0 for what a failed step did not come to.

    Attributes:
        number: of its plan.
        now: the time by which it was planned; ``arrived + queued`` of the requests that it took up first.
        began, planned: the scheduler began to plan it, and had.
        started, forward, sample, replayed: as of ``StepResult``.
        landed, committed, published: its result was there, was taken in, and the news of it were on their way.
        slices, gone: as of its plan.
        failed: it raised, or one before it did, and nothing of it counts.
        waiting: requests that waited when it was planned.
        free, cached: KV blocks of all pools that were free, and those that were kept for a prefix hit.
    """

    number: int
    now: float
    began: float
    planned: float
    slices: list[Slice]
    gone: list[int]
    waiting: int
    free: int
    cached: int
    started: float = 0.0
    forward: float = 0.0
    sample: float = 0.0
    replayed: bool = False
    landed: float = 0.0
    committed: float = 0.0
    published: float = 0.0
    failed: bool = False


class RequestTrace(NamedTuple):
    """One sample of a submission.

    Attributes:
        number: by which slices name it.
        id, sample: of the submission, as its caller named it, and which of its samples.
        prompt, cached: prompt tokens, and how many of them were found in the prefix cache.
        known, computed: tokens that there are, and those whose KV has landed.
        blocks: KV blocks that it holds.
        arrived, queued: as of ``Request``; queued is None before its first step.
        preempted, starved: as of ``Timing``.
        state: waiting, running or leaving; or how it ended.
        ended: when it did; None if it has not.
    """

    number: int
    id: str
    sample: int
    prompt: int
    cached: int
    known: int
    computed: int
    blocks: int
    arrived: float
    queued: float | None
    preempted: int
    starved: float
    state: str
    ended: float | None


class PoolTrace(NamedTuple):
    """The pool of one KV group: how many blocks are in each state (``core/kv/blocks.py``), and a sample of them.

    Attributes:
        map: a byte for each ``stride``-th block: 0 free, 1 idle, 2 open or 3 sealed, plus 4 times its readers, of whom
            no more than 63 are counted.
    """

    total: int
    window: int | None
    free: int
    open: int
    sealed: int
    idle: int
    stride: int
    map: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """``now`` is by the same clock as all moments; ``inflight`` are steps that have not landed, the oldest first;
    ``requests`` are those that ended in the time asked for, in order, then those that have not, the first in line
    first.
    """

    now: float
    steps: tuple[StepTrace, ...] = ()
    inflight: tuple[StepTrace, ...] = ()
    requests: tuple[RequestTrace, ...] = ()
    pools: tuple[PoolTrace, ...] = ()
