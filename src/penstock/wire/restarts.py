"""How often an engine is started again, and how soon."""

from __future__ import annotations

import time
from collections import deque

from penstock.wire.faults import dead

MAX_RESTARTS = 5
"""In RESTART_SECONDS. An engine that dies more often stays dead."""
RESTART_SECONDS = 60.0
FIRST_PAUSE, LAST_PAUSE = 0.1, 5.0
"""Seconds before a restart; the second in a row waits twice as long, and so on."""


class Restarts:
    def __init__(self) -> None:
        self._deaths: deque[float] = deque()
        self._pause = FIRST_PAUSE

    def after(self, why: str, since: float) -> float:
        """Seconds to wait after a death.

        Args:
            why: a sentence without its end.
            since: when that engine was started, in time.monotonic().

        Raises:
            EngineError: (engine_dead) it was one too many.
        """
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - RESTART_SECONDS:
            self._deaths.popleft()
        if len(self._deaths) > MAX_RESTARTS:
            raise dead(f"{why}, and it was started again {MAX_RESTARTS} times in {RESTART_SECONDS:g} seconds")
        self._pause = FIRST_PAUSE if now - since > RESTART_SECONDS else min(2 * self._pause, LAST_PAUSE)
        return self._pause
