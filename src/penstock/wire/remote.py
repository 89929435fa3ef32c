"""RemoteService: an engine in another process, behind the Service seam, which outlives that process.

Whoever submits never learns that an engine died. This side keeps each request's prompt and the tokens it has heard of;
when the process ends, another is started, and what was under way is submitted again as a continuation
(``Submission.emitted``). A token depends on what was before it and on its position alone, so the streams go on with the
tokens and log-probabilities of an undisturbed run.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

from penstock.base import ConfigError, EngineError, PenstockError
from penstock.core.service import Counters, Sink, Status, Submission, Update, duplicate_id, engine_stopped
from penstock.core.trace import Trace
from penstock.spec import EngineConfig
from penstock.wire.faults import dead, load_timeout, quarantined
from penstock.wire.frames import Connection, WireError, bad_frame
from penstock.wire.messages import (
    Cancel,
    Loading,
    Look,
    News,
    Ready,
    Refused,
    Seen,
    Start,
    Submit,
    decode_from_engine,
    encode,
)
from penstock.wire.process import LEAVE_SECONDS, EngineProcess
from penstock.wire.restarts import Restarts
from penstock.wire.under_way import UnderWay

log = logging.getLogger(__name__)

MAX_DEATHS = 3
"""Engines that may die of a request. After the last but one everybody is let in one by one, those that come meanwhile
too: whoever kills an engine then has come alone, and is quarantined."""
WATCH_SECONDS = 0.5
"""Between two looks at an engine's progress."""


class RemoteService:
    """Starts an engine process and speaks to it; starts another one when it dies.

    Sinks are called on a thread of this service's own, and in order.

    Args:
        argv: the command line of the process; the path of the socket is added.
        config: what it shall load; sent to every process that is started.
        check: that it could is all that ``ready`` says, and there is no engine; ``taken`` may be below 0.

    Attributes:
        taken: bytes that seem to be free, and that other engines will need; asked for each process that is started.
        step_timeout: seconds without news, while requests are under way, after which an engine counts as hung and is
            killed; None waits for ever.
        load_timeout: the same of one that loads its model, unless it fetches that. No other is started then: it would
            hang as well.
        held: bytes of this engine's weights and KV that may seem to be free to others.
        progress: share of its model that an engine has in memory while it loads it.
    """

    def __init__(
        self, argv: Sequence[str], config: EngineConfig, taken: Callable[[], int] = lambda: 0, check: bool = False
    ) -> None:
        self._argv, self._config, self.taken, self._check = list(argv), config, taken, check
        self.step_timeout: float | None = None
        self.load_timeout: float | None = None
        self.progress = 0.0
        self.held = 0
        self._frames = 0  # from all engines, that tell of progress
        self._fetching = False  # which may be silent for as long as it likes
        self._hung: EngineError | None = None  # while it loaded
        self._requests: dict[str, UnderWay] = {}
        self._lock = threading.Lock()
        self._mail: queue.SimpleQueue[bytes | None] | None = None  # of the engine that is there, if one is
        self._connection: Connection | None = None
        self._status = Status(running=0, waiting=0, blocks_total=0, blocks_used=0, counters=Counters())
        self._gone = Counters()  # what engines did that are no more
        self._epoch = 0
        self._looks: dict[int, Future[Trace]] = {}  # that have not been answered
        self._look_number = 0
        self._alone: deque[str] = deque()  # requests that wait to be tried alone, and the one that is being tried
        self._tried: str | None = None
        self._wary = False  # the last engine died of a request alone, which its client may send again at once
        self._fault: EngineError | None = None
        self._closing = threading.Event()
        self._first: Future[Ready] = Future()
        self._process = EngineProcess(self._argv)
        self._thread = threading.Thread(target=self._run, name="penstock-engine-link", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def ready(self) -> Ready:
        """Waits until the first process has its model.

        Raises:
            PenstockError: why it has none; as ``assemble.build_engine``, or engine_died, load_timeout.
        """
        return self._first.result()

    def submit(self, submission: Submission, sink: Sink) -> None:
        """As LocalService; while an engine is being started again the request waits for it.

        Raises:
            InvalidRequest: duplicate_request_id, request_unsendable, unsupported_parameter.
            EngineError: (engine_dead) it died too often; engine_closed.
        """
        frame = encode(Submit.of(submission))
        with self._lock:
            if self._fault or self._closing.is_set():
                raise self._fault or EngineError("engine_closed", "The engine was closed", fix="make a new one")
            if submission.id in self._requests:
                raise duplicate_id(submission.id)
            self._requests[submission.id] = UnderWay(submission, sink)
            if self._tried is not None:
                self._alone.append(submission.id)
            elif self._mail:
                self._mail.put(frame)

    def abort(self, id: str, sample: int | None = None) -> None:
        with self._lock:
            if (request := self._requests.get(id)) is None:
                return
            request.abort(sample)
            if self._mail:
                self._mail.put(encode(Cancel(id, sample)))

    def status(self) -> Status:
        """As the engine last told, at most a tenth of a second ago; counters go on from one engine to the next."""
        status = self._status
        return replace(status, counters=self._gone + status.counters)

    def look(self, seconds: float, blocks: int = 0) -> Future[Trace]:
        """As of ``Service``. Whoever gives up cancels it."""
        seen: Future[Trace] = Future()
        with self._lock:
            if self._mail is None:
                seen.set_exception(engine_stopped())
                return seen
            number = self._look_number = self._look_number + 1
            self._looks[number] = seen
            self._mail.put(encode(Look(number, seconds, blocks)))
        seen.add_done_callback(lambda _: self._looks.pop(number, None))
        return seen

    @property
    def alive(self) -> bool:
        """There is an engine right now."""
        return self._mail is not None and not self._closing.is_set()

    @property
    def memory(self) -> int | None:
        """Bytes that the system has back when the engine ends; None where it does not tell."""
        return self._process.memory()

    @property
    def fault(self) -> EngineError | None:
        """Why it is dead for good."""
        return self._fault

    def close(self) -> None:
        """Ends the process, and tells everybody whose request was under way."""
        atexit.unregister(self.close)
        with self._lock:
            self._closing.set()
            if self._connection:
                self._connection.close()
            else:  # there is nothing yet that it could lose
                self._process.process.kill()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # -- the thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        error = EngineError("engine_closed", "The engine was closed while the request ran")
        try:
            self._serve()
        except PenstockError as refusal:
            if not self._first.done():
                self._first.set_exception(refusal)
            error = self._fault = refusal if isinstance(refusal, EngineError) else dead(str(refusal))
        except BaseException as cause:  # whatever it is, nobody may wait for ever
            log.exception("the link to the engine ended by a fault of its own")
            error = self._fault = dead(f"{type(cause).__name__} in the link to it")
        if not self._first.done():
            self._first.set_exception(error)
        with self._lock:
            self._closing.set()
            open_requests, self._requests = self._requests, {}
        for request in open_requests.values():
            for sample in request.left:
                request.tell(Update(request.submission.id, sample, finish_reason="error", error=error))
        self._process.end(0)

    def _serve(self) -> None:
        """Follows one engine after the other.

        Raises:
            EngineError: (engine_dead) they die too often; (load_timeout) one hung while it loaded its model.
            PenstockError: why the first one did not start.
        """
        restarts = Restarts()
        while True:
            since = time.monotonic()
            served, why = self._follow()
            if self._closing.is_set():
                return
            pause = restarts.after(why, since)
            log.error("%s while %d requests were under way; it is started again", why, len(self._requests))
            self._bury(served)
            while not self._closing.wait(pause):
                try:
                    self._process = EngineProcess(self._argv)
                    break
                except ConfigError as error:  # of want that may pass: of descriptors, memory, room in TMPDIR
                    log.error("%s", error)
                    pause = restarts.after(f"{error.what}: {error.why}", time.monotonic())
            else:
                return
            self._epoch += 1
            self._gone.restarts += 1

    def _follow(self) -> tuple[bool, str]:
        """One engine from its start to its end. Returns whether it served, and how it ended. Raises as ``_serve``."""
        connection: Connection | None = None
        self._fetching, self.progress = False, 0.0
        watch = threading.Thread(target=self._watch, args=(self._process,), name="penstock-engine-watch", daemon=True)
        watch.start()
        try:
            connection = self._process.connect()
            with self._lock:  # from here on ``close`` closes it
                self._connection = connection
            if not self._closing.is_set():
                self._listen(connection)
        except WireError as error:
            self._gone.bad_frames += 1
            log.error("%s", error)
        except PenstockError as error:
            if not self._first.done() and self._hung is None:
                raise
            if not self._closing.is_set():
                log.error("%s", error)
        except OSError as error:  # it died before it was told what to load
            log.error("the engine cannot be spoken to: %s", error)
        finally:
            with self._lock:
                mail, self._mail, self._connection = self._mail, None, None
                looks = list(self._looks.values())
            for seen in looks:
                if seen.set_running_or_notify_cancel():
                    seen.set_exception(engine_stopped())
            if mail:
                mail.put(None)
            if connection:
                connection.close()
            self._process.end(LEAVE_SECONDS if self._closing.is_set() else 1.0)
        if self._hung is not None:
            raise self._hung
        if not self._first.done() and not self._closing.is_set():
            what = f"The engine process {self._process.fate()} before its model was there"
            raise EngineError("engine_died", what, fix="see the log for why; a lack of memory is the usual cause")
        return mail is not None, f"The engine process {self._process.fate()}"

    def _listen(self, connection: Connection) -> None:
        connection.send(encode(Start(self._epoch, self._config, self.taken(), self._check)))
        while (frame := connection.receive()) is not None:
            message = decode_from_engine(frame)
            self._frames += not isinstance(message, Seen)  # a hung engine answers looks
            if isinstance(message, Refused):
                raise message.error
            if message.epoch != self._epoch:
                raise bad_frame(f"it is of engine {message.epoch}, and this is {self._epoch}")
            if isinstance(message, Loading):
                self._fetching = message.share is None
                self.progress = max(self.progress, message.share or 0.0)
            elif isinstance(message, News):
                self._status = message.status
                for update in message.updates:
                    self._hear(update)
            elif isinstance(message, Seen):
                seen = self._looks.get(message.number)
                if seen and seen.set_running_or_notify_cancel():
                    seen.set_result(message.trace)
            elif self._check:
                self._first.set_result(message)
                self._closing.set()
            else:
                self._enter(connection, message)

    def _enter(self, connection: Connection, ready: Ready) -> None:
        """The engine has its model: it gets whatever is under way."""
        mail: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=_post, args=(connection, mail), name="penstock-engine-mail", daemon=True).start()
        with self._lock:
            self._mail = mail
            requests = sorted(self._requests.values(), key=lambda request: -request.deaths)
            if self._wary or (requests and requests[0].deaths >= MAX_DEATHS - 1):
                self._alone.extend(request.submission.id for request in requests)
                self._try_next()
            else:
                for request in requests:
                    self._continue(request)
        self.held = ready.held
        if not self._first.done():
            self._first.set_result(ready)

    def _watch(self, process: EngineProcess) -> None:
        """Kills an engine that is silent although it loads its model or has requests: each layer and each step tells
        something. Looks are counted, not time, so that a machine that was suspended, or a debugger that stopped both
        processes, costs no engine its life.
        """
        frames, looks = -1, 0
        while not self._closing.wait(WATCH_SECONDS) and process.process.poll() is None:
            with self._lock:
                loads = self._mail is None
                busy = not self._fetching if loads else bool(self._requests)
                looks = looks + 1 if self._frames == frames and busy else 0
                frames, silent = self._frames, looks * WATCH_SECONDS
                limit = self.load_timeout if loads else self.step_timeout
                if limit is None or silent < limit:
                    continue
                self._hung = load_timeout(silent) if loads else None
            log.error("the engine has told nothing for %g s: it hangs, and is killed", silent)
            process.process.kill()
            return

    def _continue(self, request: UnderWay) -> None:
        """Sends a request, and who of it was aborted meanwhile. The lock is held, and there is an engine."""
        assert self._mail is not None
        self._mail.put(encode(Submit.of(request.continuation())))
        for sample in sorted(request.aborted.intersection(request.left)):
            self._mail.put(encode(Cancel(request.submission.id, sample)))

    def _try_next(self) -> None:
        self._tried = None
        while self._alone and self._tried is None:
            if request := self._requests.get(self._alone.popleft()):
                self._tried = request.submission.id
                self._continue(request)

    def _hear(self, update: Update) -> None:
        if (request := self._requests.get(update.id)) is None:
            return
        self._pass_on(request, update)
        if update.id == self._tried and request.harmless:
            request.deaths = min(request.deaths, MAX_DEATHS - 2)
            with self._lock:
                self._try_next()

    def _pass_on(self, request: UnderWay, update: Update) -> None:
        if not request.hear(update):
            return
        if not request.left:
            with self._lock:
                del self._requests[update.id]
        if not request.tell(update) and not update.finish_reason:
            self.abort(update.id, update.sample)

    def _bury(self, served: bool) -> None:
        """An engine is gone, and with it what killed it the last time that may be."""
        self._gone += self._status.counters
        self._status = replace(self._status, running=0, waiting=0, blocks_used=0, counters=Counters())
        with self._lock:
            tried, self._tried = self._tried, None
            self._wary = served and tried is not None
            self._alone.clear()
            requests = list(self._requests.items())
        for id, request in requests:
            request.deaths += served and tried in (None, id)
            if served and tried == id:
                error = quarantined(request.deaths)
                for sample in request.left:
                    self._pass_on(request, Update(id, sample, finish_reason="error", error=error))


def _post(connection: Connection, mail: queue.SimpleQueue[bytes | None]) -> None:
    """Sends what is posted, on a thread of its own: an engine that is busy must hold nobody up."""
    try:
        while (frame := mail.get()) is not None:
            connection.send(frame)
    except OSError:
        pass  # it has died; whoever listens to it knows
