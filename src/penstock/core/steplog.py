"""StepLog: the last steps of an engine, for whoever wants to look.

The engine's thread adds a few numbers, and two lists that exist anyway, for each step, so that its cost does not depend
on the batch. What they mean is worked out by whoever looks, on a thread of theirs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from penstock.core.kv.blocks import BlockPool
from penstock.core.kv.groups import KVCache
from penstock.core.plan import NO_BLOCK, StepFailed, StepPlan, StepResult
from penstock.core.request import Phase, Request
from penstock.core.scheduler import Scheduler
from penstock.core.trace import PoolTrace, RequestTrace, StepTrace, Trace

MAX_STEPS = 4096
"""All of them are told in 1 MB, which an engine's process makes in 8 ms."""
MAX_SLICES = 1 << 16
"""Of all steps that are kept together: about 8 MB."""
MAX_ENDED = 4096
MAX_LIVE = 1024
"""Requests that have not ended, the first in line, in one look."""
MOST_READERS = 63


class StepLog:
    """``planned``, ``landed`` and ``ended`` belong to the engine's thread; ``look`` may be called from any.

    Args:
        clock: seconds, the same that the engine is driven by.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._steps: deque[StepTrace] = deque()
        self._inflight: deque[StepTrace] = deque()
        self._slices = 0
        self._ended: deque[RequestTrace] = deque(maxlen=MAX_ENDED)

    def planned(self, plan: StepPlan, now: float, began: float, scheduler: Scheduler) -> None:
        self._inflight.append(
            StepTrace(
                number=plan.number,
                now=now,
                began=began,
                planned=self.clock(),
                slices=plan.slices,
                gone=plan.gone,
                waiting=scheduler.in_line,
                free=sum(len(pool.free) for pool in scheduler.kv.pools),
                cached=sum(pool.idle_count for pool in scheduler.kv.pools),
            )
        )

    def landed(self, result: StepResult | StepFailed, at: float, committed: float) -> None:
        """The oldest step has; one that failed takes the later ones with it."""
        published = self.clock()
        for _ in range(len(self._inflight) if isinstance(result, StepFailed) else 1):
            step = self._inflight.popleft()
            step.landed, step.committed, step.published = at, committed, published
            if isinstance(result, StepFailed):
                step.failed = True
            else:
                step.started, step.forward, step.sample = result.started, result.forward, result.sample
                step.replayed = result.replayed
            self._keep(step)

    def _keep(self, step: StepTrace) -> None:
        self._steps.append(step)
        self._slices += len(step.slices)
        while len(self._steps) > MAX_STEPS or self._slices > MAX_SLICES:
            self._slices -= len(self._steps.popleft().slices)

    def ended(self, requests: Iterable[tuple[Request, str]], now: float) -> None:
        self._ended.extend(_told(request, reason, now) for request, reason in requests)

    def look(self, scheduler: Scheduler, seconds: float, blocks: int = 0) -> Trace:
        """As ``Service.look``. The engine may go on meanwhile: numbers of one step agree, those of two may not."""
        now = self.clock()
        since = now - seconds
        live = [request for family in list(scheduler.samples.values()) for request in family]  # copied in one go
        inflight = self._inflight.copy()
        live.sort(key=lambda request: (request.phase is not Phase.RUNNING, request.order))
        return Trace(
            now=now,
            steps=tuple(step for step in self._steps.copy() if step.published >= since),
            inflight=tuple(step for step in inflight if not step.published),  # or it has landed since
            requests=(
                *(request for request in self._ended.copy() if request.ended is None or request.ended >= since),
                *(_told(request) for request in live[:MAX_LIVE] if request.phase is not Phase.DONE),
            ),
            pools=tuple(_pool(scheduler.kv, group, blocks) for group in range(len(scheduler.kv.pools))),
        )


def _told(request: Request, state: str | None = None, ended: float | None = None) -> RequestTrace:
    return RequestTrace(
        number=request.id,
        id=request.submission.id,
        sample=request.sample,
        prompt=request.prompt_len,
        cached=request.cached,
        known=len(request.tokens),
        computed=request.computed,
        blocks=sum(len(table) - table.count(NO_BLOCK) for table in request.tables),
        arrived=request.arrived,
        queued=request.queued,
        preempted=request.preempted,
        starved=request.starved,
        state=state or request.phase.value,
        ended=ended,
    )


def _pool(kv: KVCache, group: int, blocks: int) -> PoolTrace:
    pool = kv.pools[group]
    free, idle, named = len(pool.free), pool.idle_count, len(pool.by_key)
    sealed = max(0, named - idle)
    stride = -(-pool.total // blocks) if blocks else 1
    return PoolTrace(
        total=pool.total,
        window=kv.specs[group].window,
        free=free,
        open=max(0, pool.total - free - idle - sealed),
        sealed=sealed,
        idle=idle,
        stride=max(1, stride),
        map=_map(pool, max(1, stride)) if blocks else b"",
    )


def _map(pool: BlockPool, stride: int) -> bytes:
    return bytes(
        4 * min(refs, MOST_READERS) + (2 if refs else 0) + (key is not None)
        for refs, key in zip(pool.refs[::stride], pool.keys[::stride], strict=True)
    )
