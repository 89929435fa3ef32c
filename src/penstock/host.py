"""The engine process: ``python -m penstock.host SOCKET``, started by ``wire.RemoteService`` and never by hand.

It says what its model is, takes submissions, and sends the news of each step in one frame. It ends when the socket
does: nobody would hear it any more.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.assemble import Face, Loaded, check_behind, find_model, load_behind, read_face
from penstock.base import EngineError, InvalidRequest, PenstockError
from penstock.base.logs import unhurried
from penstock.core.engine import Engine, Mail
from penstock.core.service import Abort, Status, Submission, Update
from penstock.core.steplog import StepLog
from penstock.spec import EngineConfig
from penstock.spec.location import locate
from penstock.wire import (
    Connection,
    Loading,
    Look,
    News,
    Ready,
    Refused,
    Seen,
    Start,
    WireError,
    decode_to_engine,
    encode,
)

if TYPE_CHECKING:
    from penstock.grammar import Grammar

log = logging.getLogger(__name__)

STATUS_SECONDS = 0.1
"""How old what the other side knows of this engine may be."""

LEAVE_SECONDS = 30.0
"""For the last step, once nobody listens."""


class Host:
    """One engine at the end of a connection. ``listen`` runs on one thread, ``run`` on another."""

    def __init__(self, connection: Connection, epoch: int, face: Face, loaded: Loaded) -> None:
        setup = loaded.setup
        self._connection, self._epoch, self._face, self._executor = connection, epoch, face, loaded.executor
        self._engine = Engine(
            setup.scheduler(), loaded.executor, self._deliver, setup.depth, log=StepLog(time.monotonic)
        )
        self._wake = threading.Event()
        self._closing = False
        self._compiler = ThreadPoolExecutor(2, "penstock-grammar")
        self._compiling: dict[str, list[Mail]] = {}  # and what else came for them meanwhile, in order
        self._grammars: dict[str, Grammar] = {}  # of requests that run, so that a step finds them compiled
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._told: Status | None = None
        self._told_at = 0.0
        self._ready = Ready(
            epoch=epoch,
            config=loaded.config,
            pools=tuple((pool.blocks, pool.window) for pool in setup.pools),
            numerics_id=setup.numerics_id,
            whole=setup.limits.whole,
            one_answer=loaded.one_answer,
            held=loaded.held,
        )

    # -- the engine's thread -------------------------------------------------------------------------

    def run(self) -> None:
        """Raises what is a fault of the loop itself: then this process is of no use any more."""
        engine = self._engine
        self._send_frame(encode(self._ready))
        while not self._closing:
            if not engine.busy:
                self._report()
                self._wake.wait()
                self._wake.clear()
            engine.launch(time.monotonic())
            engine.land()
            if time.monotonic() - self._told_at > STATUS_SECONDS:
                self._report()
        self._executor.close()

    def _deliver(self, updates: list[Update]) -> None:
        for update in updates if self._grammars else ():
            if update.finish_reason and update.id not in self._engine.scheduler.samples:
                self._grammars.pop(update.id, None)
        self._report(updates)

    def _report(self, updates: list[Update] | None = None) -> None:
        """Sends news, and how the engine is if that changed."""
        status = self._engine.scheduler.status()
        self._told_at = time.monotonic()
        if updates or status != self._told:
            self._told = status
            self._send(updates or [], status)

    def _send(self, updates: list[Update], status: Status) -> None:
        try:
            frame = encode(News(self._epoch, tuple(updates), status))
        except InvalidRequest as error:
            if len(updates) > 1:  # together they are too large
                half = len(updates) // 2
                self._send(updates[:half], status)
                self._send(updates[half:], status)
                return
            (update,) = updates
            why = EngineError(
                "answer_unsendable",
                "The answer cannot be sent from the engine",
                why=error.why,
                fix="ask for less, such as fewer logprobs",
            )
            self._engine.post(Abort(update.id, update.sample))
            last = Update(update.id, update.sample, finish_reason="error", error=why)
            frame = encode(News(self._epoch, (last,), status))
        self._send_frame(frame)

    def _send_frame(self, frame: bytes) -> None:
        try:
            with self._sending:
                self._connection.send(frame)
        except OSError:
            self._closing = True  # nobody is there any more

    # -- the thread that listens ---------------------------------------------------------------------

    def listen(self) -> None:
        """Takes mail until the connection ends, and the engine with it."""
        try:
            while (frame := self._connection.receive()) is not None:
                message = decode_to_engine(frame)
                if isinstance(message, Start):
                    raise WireError("bad_frame", "An engine is started once", fix="report this")
                if isinstance(message, Look):
                    self._show(message)
                else:
                    self._take(message if isinstance(message, Submission) else Abort(message.id, message.sample))
        except WireError as error:
            log.error("%s", error)
        self._closing = True
        self._wake.set()
        leave_at_last()

    def _show(self, look: Look) -> None:
        """On this thread, so that a step that hangs can be looked at. A fault of it is not the engine's."""
        try:
            frame = encode(Seen(self._epoch, look.number, self._engine.look(look.seconds, look.blocks)))
        except Exception:
            log.exception("the engine could not be looked at")
        else:
            self._send_frame(frame)

    def _take(self, mail: Mail) -> None:
        with self._lock:
            if mail.id in self._compiling:
                self._compiling[mail.id].append(mail)
                return
            if isinstance(mail, Submission) and mail.params.structured_outputs is not None:
                self._compiling[mail.id] = [mail]
                self._compiler.submit(self._compile, mail)
                return
        self._post([mail])

    def _compile(self, submission: Submission) -> None:
        """Beside the engine's thread, so that no step waits for it."""
        wanted = submission.params.structured_outputs
        assert wanted is not None
        try:
            self._grammars[submission.id] = self._face.grammars().compile(wanted)
        except PenstockError as error:  # whoever submitted has compiled it before: the step says what is wrong
            log.warning("%s", error)
        finally:
            with self._lock:
                self._post(self._compiling.pop(submission.id))

    def _post(self, mail: list[Mail]) -> None:
        for item in mail:
            self._engine.post(item)
        self._wake.set()


def leave_at_last() -> None:
    """Ends the process although a thread of it hangs."""
    timer = threading.Timer(LEAVE_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()


Told = Callable[[float | None], None]
Load = Callable[[EngineConfig, Told, int], tuple[Face, Loaded]]


def load(config: EngineConfig, told: Told, taken: int) -> tuple[Face, Loaded]:
    """Tells how much of it is there; None before it is fetched. Raises as ``assemble.build_engine``."""
    folder = _find(config, told)
    face = read_face(folder, config)
    return face, load_behind(face, folder, config, told, taken)


def check(config: EngineConfig, told: Told, taken: int) -> None:
    """What of ``load`` can be known at once. Raises the same."""
    folder = _find(config, told)
    read_face(folder, config)
    check_behind(folder, config, taken)


def _find(config: EngineConfig, told: Told) -> Path:
    if not isinstance(locate(config.model), Path):
        told(None)
    folder = find_model(config.model)
    told(0.0)
    return folder


def main(path: str, load: Load = load) -> None:
    unhurried()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # whoever serves has been told too, and may still be draining
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with suppress(OSError):  # nobody is there any more, here and below
        sock.connect(path)
    connection, loaded = Connection(sock), threading.Event()
    if (frame := connection.receive()) is None:
        return
    start = decode_to_engine(frame)
    if not isinstance(start, Start):
        raise WireError("bad_frame", "The first frame does not start an engine", fix="report this")

    def watch() -> None:
        """Nothing is sent before the model is there, unless that is the end."""
        if not sock.recv(1, socket.MSG_PEEK) and not loaded.is_set():
            os._exit(0)

    def tell(share: float | None) -> None:
        with suppress(OSError):
            connection.send(encode(Loading(start.epoch, share)))

    threading.Thread(target=watch, name="penstock-watch", daemon=True).start()
    try:
        if start.check:
            check(start.config, tell, start.taken)
            connection.send(encode(Ready(start.epoch, start.config, (), b"", False, False)))
            return
        host = Host(connection, start.epoch, *load(start.config, tell, start.taken))
    except Exception as error:
        with suppress(OSError):
            connection.send(encode(Refused(refusal(error))))
        return
    finally:
        loaded.set()
    listener = threading.Thread(target=host.listen, name="penstock-mail", daemon=True)
    listener.start()
    host.run()
    listener.join()  # it knows the model, which has to be freed before the interpreter is


def refusal(error: Exception) -> PenstockError:
    if isinstance(error, PenstockError):
        return error
    log.error("the model cannot be loaded", exc_info=error)
    why = f"{type(error).__name__}: {error}"[:300]
    return EngineError("load_failed", "The model cannot be loaded", why=why, fix="see the log for the traceback")


if __name__ == "__main__":
    main(sys.argv[1])
