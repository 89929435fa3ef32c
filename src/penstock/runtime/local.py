"""LocalExecutor: plans computed in this process."""

from __future__ import annotations

import logging
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from penstock.base import EngineError, PenstockError
from penstock.core.plan import StepFailed, StepPlan, StepResult

log = logging.getLogger(__name__)


class Pending(Protocol):
    """A step handed to the device."""

    def result(self) -> StepResult: ...


class StepRunner(Protocol):
    """``Runner`` or ``EncoderRunner``."""

    def launch(self, plan: StepPlan) -> Pending: ...


Launched = Pending | StepFailed


@dataclass(slots=True)
class LocalTicket:
    step: Future[Launched] | Launched
    number: int

    def wait(self) -> StepResult | StepFailed:
        try:
            step = self.step.result() if isinstance(self.step, Future) else self.step
            return step if isinstance(step, StepFailed) else step.result()
        except Exception as error:  # a fault on a device that works on its own shows only now
            return step_failed(self.number, error)


class LocalExecutor:
    """Runs steps in the caller's thread, or with ``overlap`` in one of its own, in order, so that the scheduler
    can plan the next step meanwhile. A step that raises becomes a StepFailed; what it left half-written is
    replaced when the scheduler introduces its requests anew.
    """

    def __init__(self, runner: StepRunner, *, overlap: bool = False) -> None:
        self.runner = runner
        self._steps: queue.SimpleQueue[tuple[StepPlan, Future[Launched]] | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work, name="penstock-step", daemon=True) if overlap else None
        if self._worker:
            self._worker.start()

    def submit(self, plan: StepPlan) -> LocalTicket:
        if not self._worker:
            return LocalTicket(self._launch(plan), plan.number)
        step: Future[Launched] = Future()
        self._steps.put((plan, step))
        return LocalTicket(step, plan.number)

    def close(self) -> None:
        """Waits for the steps in flight."""
        if self._worker:
            self._steps.put(None)
            self._worker.join()

    def _work(self) -> None:
        # Not a ThreadPoolExecutor: the interpreter shuts those down before it lets a running engine close.
        while work := self._steps.get():
            plan, step = work
            try:
                step.set_result(self._launch(plan))
            except BaseException as error:  # or who waits for the step would wait for ever
                step.set_exception(error)

    def _launch(self, plan: StepPlan) -> Launched:
        try:
            return self.runner.launch(plan)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of compiled code is no Exception, and must end no thread
            return step_failed(plan.number, error)


def step_failed(number: int, error: BaseException) -> StepFailed:
    log.error("step %d failed", number, exc_info=error)
    if isinstance(error, PenstockError):
        why = str(error)
    else:
        why = f"{type(error).__name__}: {error}"
    return StepFailed(EngineError("step_failed", f"Step {number} failed", why=why, fix="see the log for the traceback"))
