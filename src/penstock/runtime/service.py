"""LocalService: an engine on a thread of its own, behind the Service seam."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from concurrent.futures import Future

from penstock.base import EngineError
from penstock.core.engine import Engine, Journal
from penstock.core.plan import Executor
from penstock.core.scheduler import Scheduler
from penstock.core.service import Abort, Sink, Status, Submission, Update, duplicate_id
from penstock.core.steplog import StepLog
from penstock.core.trace import Trace

log = logging.getLogger(__name__)


class LocalService:
    """Runs the loop while there is work and sleeps otherwise. Sinks are called on the engine's thread."""

    def __init__(
        self, scheduler: Scheduler, executor: Executor, depth: int = 1, journal: Journal | None = None
    ) -> None:
        self._engine = Engine(scheduler, executor, self._deliver, depth, journal, StepLog(time.monotonic))
        self._executor = executor
        self._sinks: dict[str, tuple[Sink, set[int]]] = {}  # and the samples that have not ended
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._fault: EngineError | None = None
        self._thread = threading.Thread(target=self._run, name="penstock-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread that is inside torch when the interpreter ends aborts the process

    def submit(self, submission: Submission, sink: Sink) -> None:
        """Raises InvalidRequest(duplicate_request_id), or EngineError(engine_dead) after a fault of the loop."""
        with self._lock:
            if self._fault or self._closing:
                raise self._fault or EngineError("engine_closed", "The engine was closed", fix="make a new one")
            if submission.id in self._sinks:
                raise duplicate_id(submission.id)
            self._sinks[submission.id] = (sink, {sample for sample, _ in submission.unfinished})
        self._engine.post(submission)
        self._wake.set()

    def abort(self, id: str, sample: int | None = None) -> None:
        self._engine.post(Abort(id, sample))
        self._wake.set()

    def status(self) -> Status:
        return self._engine.scheduler.status()

    def look(self, seconds: float, blocks: int = 0) -> Future[Trace]:
        """As of ``Service``; it does not wait."""
        seen: Future[Trace] = Future()
        seen.set_result(self._engine.look(seconds, blocks))
        return seen

    @property
    def alive(self) -> bool:
        return self._fault is None and not self._closing

    def close(self) -> None:
        """Aborts what is running and stops the thread."""
        with self._lock:
            self._closing = True
        atexit.unregister(self.close)
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closing:
                if not self._engine.busy:
                    self._wake.wait()
                    self._wake.clear()
                self._engine.launch(time.monotonic())
                self._engine.land()
            error = EngineError("engine_closed", "The engine was closed while the request ran")
        except BaseException as cause:  # whatever it is, nobody may wait for ever
            log.exception("the engine loop ended by a fault of its own")
            error = self._fault = EngineError(
                "engine_dead",
                "The engine stopped",
                why=f"{type(cause).__name__} in its loop",
                fix="restart it and report the log",
            )
        self._end_all(error)
        self._executor.close()

    def _tell(self, sink: Sink, update: Update) -> bool:
        """Whether the caller took it. A caller's fault is not the engine's."""
        try:
            sink(update)
        except Exception:
            log.exception("the sink of request %s raised", update.id)
            return False
        return True

    def _deliver(self, updates: list[Update]) -> None:
        for update in updates:
            sink, left = self._sinks[update.id]
            if update.finish_reason:
                left.discard(update.sample)
                if not left:
                    with self._lock:
                        del self._sinks[update.id]
            if not self._tell(sink, update) and not update.finish_reason:
                self._engine.post(Abort(update.id, update.sample))

    def _end_all(self, error: EngineError) -> None:
        with self._lock:
            self._closing = True
            open_sinks, self._sinks = self._sinks, {}
        for id, (sink, left) in open_sinks.items():
            for sample in sorted(left):
                self._tell(sink, Update(id, sample, finish_reason="error", error=error))
