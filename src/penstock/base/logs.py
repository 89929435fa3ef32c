"""Log records on their way out, which nobody waits for."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque

MAX_PENDING = 1000
FLUSH_SECONDS = 1.0


class Unhurried(logging.Handler):
    """Writes records to stderr on a thread of its own. If nobody reads what is there, those that follow are dropped and
    counted: a full pipe must not stop a server.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.dropped = 0
        self._pending: deque[str] = deque()
        self._wake = threading.Condition()
        threading.Thread(target=self._run, name="penstock-stderr", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        with self._wake:
            if len(self._pending) < MAX_PENDING:
                self._pending.append(text)
                self._wake.notify()
            else:
                self.dropped += 1

    def flush(self) -> None:
        """Waits until all is written, for FLUSH_SECONDS at most."""
        deadline = time.monotonic() + FLUSH_SECONDS
        while self._pending and time.monotonic() < deadline:
            time.sleep(0.005)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._pending:
                    self._wake.wait()
                text = self._pending[0]
            try:
                sys.stderr.write(f"{text}\n")
                sys.stderr.flush()
            except (OSError, ValueError):  # closed at the other end, or at this one
                self.dropped += 1
            self._pending.popleft()


def unhurried() -> Unhurried:
    """The one through which this process logs; it is made, and takes the place of logging's last resort, when it is
    first asked for."""
    root = logging.getLogger()
    found = next((handler for handler in root.handlers if isinstance(handler, Unhurried)), None)
    if found is None:
        found = Unhurried()
        root.addHandler(found)
    return found
