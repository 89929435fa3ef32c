"""The heartbeat of the event loop: how late it runs what is due, and the end of a process whose loop stands still."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Histogram

from penstock.base.logs import unhurried
from penstock.serving import limits

EVERY, IDLE_EVERY = 0.005, 0.1
"""Seconds between beats, with requests under way and without."""

STUCK_STATUS = 70
"""Exit status of a process that ended itself (EX_SOFTWARE of sysexits.h)."""

_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_TICK, SHOWN = 1.0, 12
_log = logging.getLogger(__name__)


class Pulse:
    """Beats in the event loop and is watched from a thread.

    Args:
        busy: whether there are requests under way.
    """

    def __init__(self, registry: CollectorRegistry, busy: Callable[[], bool]) -> None:
        what = "How late the event loop ran what was due"
        self._lag = Histogram("penstock_event_loop_lag_seconds", what, buckets=_BUCKETS, registry=registry)
        self._busy = busy
        self._beats = 0
        self._stop = threading.Event()

    async def beat(self) -> None:
        """Until it is cancelled, from the loop's own thread."""
        watch = threading.Thread(target=self._watch, args=(threading.get_ident(),), name="penstock-pulse", daemon=True)
        watch.start()
        try:
            while True:
                self._beats += 1
                due = time.perf_counter() + (EVERY if self._busy() else IDLE_EVERY)
                await asyncio.sleep(due - time.perf_counter())
                self._lag.observe(max(0.0, time.perf_counter() - due))
        finally:
            self._stop.set()

    def _watch(self, thread: int) -> None:
        """Counts its own ticks, not the clock's: of a process that was stopped and goes on nobody is to blame."""
        seen, still = self._beats, 0
        while not self._stop.wait(_TICK):
            still = still + 1 if seen == self._beats else 0
            seen = self._beats
            if still == limits.STILL_SECONDS:
                frames = traceback.format_stack(sys._current_frames().get(thread))[-SHOWN:]
                _log.error("the event loop has stood still for %d s:\n%s", still, "".join(frames))
            elif still >= limits.STUCK_SECONDS:
                _log.critical("the event loop has stood still for %d s: this process ends", still)
                unhurried().flush()
                os._exit(STUCK_STATUS)
