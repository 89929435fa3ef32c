"""A line of JSON for each request, in a file. What the disk does not take in time is dropped and counted."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from penstock.base import ConfigError
from penstock.serving.gate import Caller

MAX_PENDING = 10_000
"""Lines that wait for the disk."""

_log = logging.getLogger(__name__)


class Line(msgspec.Struct, kw_only=True):
    """One request.

    Attributes:
        time: of its arrival, UTC, in ISO 8601.
        id: as in x-request-id.
        tenant, key: whose it was, and by which key (its id); None where the server asks for none.
        finish: how its completions ended; the worst of them.
        admitted_s, started_s, first_token_s, total_s: seconds from its arrival. Admitted: its body has arrived, its
            prompt is in tokens, and there was room in the queue. Started: the engine's first step with it began.
        ahead: requests under way when it came.
        longest_gap_s: the longest time that one of its tokens after the first took to come.
        preempted: times that the engine gave its KV up for another's.
        starved_s: seconds in which it was not computed for want of KV blocks, once it had begun; starved_first_s: those
            before its first token.
        client_s: seconds in which its client did not take what was written.
        load_s: seconds in which it waited for its model to be loaded, before it was admitted.
    """

    time: datetime
    id: str
    tenant: str | None
    key: str | None
    path: str
    status: int
    model: str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish: str | None
    admitted_s: float | None
    started_s: float | None
    first_token_s: float | None
    total_s: float
    ahead: int
    longest_gap_s: float
    preempted: int = 0
    starved_s: float = 0.0
    starved_first_s: float = 0.0
    client_s: float = 0.0
    load_s: float = 0.0


def line_of(caller: Caller, path: str, status: int) -> Line:
    """Of a request that has ended just now."""
    now, key = time.monotonic(), caller.key

    def since_arrival(then: float | None) -> float | None:
        return None if then is None else round(then - caller.arrived, 6)

    return Line(
        time=datetime.fromtimestamp(time.time() - (now - caller.arrived), UTC),
        id=caller.id,
        tenant=None if key is None else key.tenant,
        key=None if key is None else key.id,
        path=path[:200],
        status=status,
        model=caller.model,
        prompt_tokens=caller.prompt_tokens,
        cached_tokens=caller.cached_tokens,
        completion_tokens=caller.completion_tokens,
        finish=caller.finish,
        admitted_s=since_arrival(caller.admitted),
        started_s=since_arrival(caller.started),
        first_token_s=since_arrival(caller.first_token),
        total_s=round(now - caller.arrived, 6),
        ahead=caller.ahead,
        longest_gap_s=round(caller.longest_gap, 6),
        preempted=caller.preempted,
        starved_s=round(caller.starved, 6),
        starved_first_s=round(caller.starved_first, 6),
        client_s=round(sum(seconds for _, seconds in caller.stalls), 6),
        load_s=round(caller.load, 6),
    )


class RequestLog:
    """Appends to a file of mode 0600, on a thread of its own.

    Attributes:
        dropped: lines that were not written.

    Raises:
        ConfigError: (log_not_written) it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.dropped = 0
        self._pending: deque[Line] = deque()
        self._wake = threading.Event()
        self._closing = self._moved = self._complained = self._torn = False
        self._file = self._open()
        self._thread = threading.Thread(target=self._run, name="penstock-log", daemon=True)
        self._thread.start()

    def add(self, line: Line) -> None:
        if len(self._pending) >= MAX_PENDING:
            self.dropped += 1
            return
        self._pending.append(line)
        self._wake.set()

    def reopen(self) -> None:
        """Goes on in a new file if the old one was moved away."""
        self._moved = True
        self._wake.set()

    def close(self) -> None:
        """Writes what is pending, for a second at most."""
        self._closing = True
        self._wake.set()
        self._thread.join(1.0)

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise ConfigError(
                "log_not_written", f"{self.path} cannot be written", why=why, fix="choose another --log-file"
            ) from error

    def _follow(self) -> None:
        try:
            old, self._file = self._file, self._open()
        except ConfigError as error:
            _log.error("the log goes on where it was: %s", error)
        else:
            os.close(old)
            self._complained = self._torn = False

    def _run(self) -> None:
        while not (self._closing and not self._pending):
            self._wake.wait()
            self._wake.clear()
            if self._moved:
                self._moved = False
                self._follow()
            while self._pending:
                count = min(len(self._pending), 256)
                lines = [self._pending.popleft() for _ in range(count)]
                self._write(lines)

    def _write(self, lines: list[Line]) -> None:
        """A disk that fills up takes a part: what it has no place for counts, and a torn line is ended before others
        follow it."""
        data = b"\n" * self._torn + b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
        except OSError as error:
            self.dropped += len(lines) - max(0, data.count(b"\n", 0, written) - self._torn)
            self._torn = data[written - 1 : written] != b"\n" if written else self._torn
            if not self._complained:  # once, or a full disk would fill the other log
                self._complained = True
                _log.error("requests are no longer logged: %s", error)
        else:
            self._torn = False
            if self._complained:
                self._complained = False
                _log.warning("requests are logged again; %d were not", self.dropped)
