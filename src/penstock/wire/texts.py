"""Tokenizing in processes beside the one that answers: of long texts and conversations, so that its loop stays free.

A worker has one text at a time. One that dies is replaced, and the next one is given the text it was at, once.
"""

from __future__ import annotations

import logging
import queue
import threading
from array import array
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from penstock.base import EngineError, PenstockError
from penstock.spec import EngineConfig
from penstock.wire.frames import Connection
from penstock.wire.messages import Chat, Opening, Refused, Text, Tokens, decode_from_texts, encode
from penstock.wire.process import EngineProcess

log = logging.getLogger(__name__)

PATIENCE = 120.0
"""Seconds after which a worker that says nothing is taken for dead. The longest text there is takes it five."""


@dataclass(frozen=True, slots=True)
class Tokenized:
    """``text``: of a conversation, as the model reads it."""

    ids: array[int]
    text: str | None


@dataclass(slots=True)
class _Order:
    frame: bytes
    future: Future[Tokenized] = field(default_factory=Future)


class TextWorkers:
    """Starts a worker when there is a text for it, ``workers`` at most.

    Args:
        argv: the command line of one; the path of its socket is added.
        config: of the model whose tokenizer it reads, ``max_model_len`` resolved.
    """

    def __init__(self, argv: Sequence[str], config: EngineConfig, workers: int) -> None:
        self._argv, self._opening, self._most = list(argv), encode(Opening(config)), workers
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._waiting = 0
        self._closed = False
        self.pids: set[int] = set()
        self.deaths = 0

    def tokenize(self, order: Text | Chat) -> Future[Tokenized]:
        """Its future has what ``Prompts`` raises, or EngineError: tokenizer_died, engine_closed.

        Raises:
            InvalidRequest: (request_unsendable) as ``encode``.
        """
        sent = _Order(encode(order))
        with self._lock:
            if self._closed:
                raise _closed()
            self._waiting += 1
            if self._waiting > len(self._threads) < self._most:
                thread = threading.Thread(target=self._serve, name="penstock-texts", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._orders.put(sent)  # not behind what ``close`` puts: nobody would get to it
        return sent.future

    def close(self) -> None:
        """Ends the workers once they are done with what they are at; who still waits for one is told."""
        with self._lock:
            self._closed = True
        for _ in self._threads:
            self._orders.put(None)
        for thread in self._threads:
            thread.join(1.0)

    def _serve(self) -> None:
        """One worker after the other, until there are no more orders."""
        worker: _Worker | None = None
        while (order := self._orders.get()) is not None:
            if order.future.set_running_or_notify_cancel():
                if self._closed:
                    order.future.set_exception(_closed())
                else:
                    worker = self._carry_out(order, worker)
            with self._lock:
                self._waiting -= 1
        if worker:
            self._end(worker)

    def _carry_out(self, order: _Order, worker: _Worker | None) -> _Worker | None:
        """Returns the worker for the next one."""
        for _ in range(2):
            try:
                worker = worker or self._start()
                answer = worker.ask(order.frame)
                if isinstance(answer, Refused):
                    order.future.set_exception(answer.error)
                else:
                    order.future.set_result(Tokenized(array("I", answer.ids), answer.text))
                return worker
            except (OSError, ValueError, PenstockError) as error:  # ValueError: of ids that are none
                self.deaths += 1
                if worker:
                    self._end(worker)
                worker, why = None, str(error)
                log.error("a process that tokenizes has ended: %s", error)
        fix = "send it again, and report it if that fails"
        order.future.set_exception(EngineError("tokenizer_died", "The text could not be tokenized", why=why, fix=fix))
        return None

    def _start(self) -> _Worker:
        worker = _Worker(EngineProcess(self._argv), self._opening)
        self.pids.add(worker.process.process.pid)
        return worker

    def _end(self, worker: _Worker) -> None:
        self.pids.discard(worker.process.process.pid)
        worker.connection.close()
        worker.process.end(1.0)


class _Worker:
    """Raises EngineError: (engine_died) it ended before it knocked. OSError: it ended then."""

    def __init__(self, process: EngineProcess, opening: bytes) -> None:
        self.process = process
        self.connection: Connection = process.connect()
        self.connection.be_patient(PATIENCE)
        self.connection.send(opening)

    def ask(self, frame: bytes) -> Tokens | Refused:
        """Raises OSError, WireError: there is no answer."""
        self.connection.send(frame)
        if (answer := self.connection.receive()) is None:
            raise ConnectionError("it gave no answer")
        return decode_from_texts(answer)


def _closed() -> EngineError:
    return EngineError("engine_closed", "The engine was closed", fix="make a new one")
