"""Engine: an inbox, a scheduler, an executor and a depth. The same loop serves, is replayed and is simulated."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from penstock.base import EngineError, PenstockError
from penstock.core.plan import Executor, StepFailed, StepPlan, StepResult, Ticket
from penstock.core.scheduler import Scheduler
from penstock.core.service import Abort, Submission, Update
from penstock.core.steplog import StepLog
from penstock.core.trace import Trace

Mail = Submission | Abort


class Journal(Protocol):
    """Hears of everything that enters the loop, so that a run can be replayed (``penstock.sim.replay``)."""

    def launched(self, now: float, mail: tuple[Mail, ...], plans: tuple[StepPlan, ...]) -> None: ...

    def landed(self, plan: StepPlan, result: StepResult | StepFailed) -> None: ...


class Engine:
    """Drive it with ``launch`` and ``land`` in turn, from one thread; ``post`` may be called from any.

    Args:
        depth: steps in flight: 1 is the plain loop, 2 overlaps scheduling with compute, more is a pipeline.
        deliver: called with the news of each launch and landing; must not block.
        log: keeps the last steps, for ``look``.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        deliver: Callable[[list[Update]], None],
        depth: int = 1,
        journal: Journal | None = None,
        log: StepLog | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.depth = depth
        self.inbox: deque[Mail] = deque()  # append and popleft are atomic
        self.inflight: deque[tuple[StepPlan, Ticket]] = deque()
        self._deliver = deliver
        self._journal, self._log = journal, log

    def post(self, mail: Mail) -> None:
        self.inbox.append(mail)

    @property
    def busy(self) -> bool:
        return bool(self.inbox or self.inflight or not self.scheduler.idle)

    def launch(self, now: float) -> None:
        """Takes the mail and fills the pipeline. Never waits for a step."""
        mail = self._take_mail(now)
        self._let_go(now)
        plans: list[StepPlan] = []
        while len(self.inflight) < self.depth and (plan := self._plan(now)):
            self.inflight.append((plan, self.executor.submit(plan)))
            plans.append(plan)
        if self._journal:
            self._journal.launched(now, mail, tuple(plans))
        self._flush()
        if not self.inflight and not self.scheduler.idle:
            raise EngineError("engine_stalled", "Requests wait and nothing can be computed", fix="report this")

    def land(self) -> None:
        """Waits for the oldest step and takes in its result. A failed one takes the later ones with it."""
        if not self.inflight:
            return
        plan, ticket = self.inflight.popleft()
        result = ticket.wait()
        if isinstance(result, StepFailed):
            while self.inflight:
                self.inflight.popleft()[1].wait()
        landed = self._log.clock() if self._log else 0.0
        self.scheduler.commit(plan, result)
        if self._journal:
            self._journal.landed(plan, result)
        committed = self._log.clock() if self._log else 0.0
        self._let_go(committed)
        self._flush()
        if self._log:
            self._log.landed(result, landed, committed)

    def look(self, seconds: float, blocks: int = 0) -> Trace:
        """As ``Service.look``, from any thread. Only with a log."""
        assert self._log is not None
        return self._log.look(self.scheduler, seconds, blocks)

    def _plan(self, now: float) -> StepPlan | None:
        began = self._log.clock() if self._log else 0.0
        plan = self.scheduler.plan(now)
        if self._log and plan:
            self._log.planned(plan, now, began, self.scheduler)
        return plan

    def _let_go(self, now: float) -> None:
        if ended := self.scheduler.ended:
            self.scheduler.ended = []
            if self._log:
                self._log.ended(ended, now)

    def _take_mail(self, now: float) -> tuple[Mail, ...]:
        mail: list[Mail] = []
        while self.inbox:
            item = self.inbox.popleft()
            mail.append(item)
            if isinstance(item, Abort):
                self.scheduler.abort(*item)
                continue
            try:
                self.scheduler.add(item, now)
            except PenstockError as error:
                self._refuse(item, error)
            except Exception as cause:  # a caller's fault must not end the engine of all others
                why = type(cause).__name__
                fix = "check the types of its fields"
                self._refuse(item, EngineError("submission_failed", "The request could not be read", why=why, fix=fix))
        return tuple(mail)

    def _refuse(self, submission: Submission, error: PenstockError) -> None:
        for sample, _ in submission.unfinished:
            self.scheduler.outbox.append(Update(submission.id, sample, finish_reason="error", error=error))

    def _flush(self) -> None:
        if news := self.scheduler.outbox:
            self.scheduler.outbox = []
            self._deliver(news)
