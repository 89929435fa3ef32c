"""From the thread of an engine into an event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress

from penstock.core.service import Update

LINGER = 0.001
"""Seconds for which a woken loop collects further updates before it delivers them."""

AT_ONCE = 32
"""Updates delivered in one turn of the loop: a few milliseconds' work of whoever hears them, and then it is others'."""

SORTED_AT_ONCE = 2048


class Mailbox:
    """Carries updates from the engine's thread into an event loop, with few wake-ups.

    Waking a loop is a system call, on which the engine's thread also loses the interpreter. So the first update of a
    step wakes the loop and is delivered at once, and those that follow within LINGER are delivered together. What waits
    for the same reader is delivered together too: a loop that is behind then has fewer readers to wake.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._posted: deque[tuple[asyncio.Queue[Update], Update]] = deque()
        self._sorted: dict[asyncio.Queue[Update], deque[Update]] = {}
        self._awake = False

    def post(self, queue: asyncio.Queue[Update], update: Update) -> None:
        self._posted.append((queue, update))
        if not self._awake:
            self._awake = True
            with suppress(RuntimeError):  # a closed loop has no readers left
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        if not self._posted and not self._sorted:
            self._awake = False
            if not self._posted:  # posted before the line above: nobody woke us for it
                return
            self._awake = True
        for _ in range(min(len(self._posted), SORTED_AT_ONCE)):
            queue, update = self._posted.popleft()
            self._sorted.setdefault(queue, deque()).append(update)
        room = AT_ONCE
        while room and self._sorted:
            queue, updates = next(iter(self._sorted.items()))
            for _ in range(min(room, len(updates))):
                queue.put_nowait(updates.popleft())
                room -= 1
            if not updates:
                del self._sorted[queue]
        if self._sorted or self._posted:
            self.loop.call_soon(self._deliver)
        else:
            self.loop.call_later(LINGER, self._deliver)
