"""A bound on what one turn of the event loop takes, however many requests are ready in it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable


class Turnstile:
    """Lets ``most`` tasks through in a turn of the loop, in the order in which they came; the others in later ones.

    What a task does before it waits for anything is a part of the turn: 500 requests of half a millisecond that arrive
    together would stop every stream for a quarter of a second.
    """

    def __init__(self, most: int) -> None:
        self._most = self._left = most
        self._following = False  # another turn is due
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        self._follow()
        if self._left:
            self._left -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn

    def let_in(self, waiting: Iterable[asyncio.Future[None]]) -> None:
        """Ends these futures when it is their turn, instead of tasks that ``enter``."""
        self._waiting.extend(waiting)
        if self._waiting:
            self._follow()

    def _follow(self) -> None:
        if not self._following:
            self._following = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._left, self._following = self._most, False
        while self._left and self._waiting:
            if not (turn := self._waiting.popleft()).done():  # it may have been cancelled
                turn.set_result(None)
                self._left -= 1
        if self._left < self._most:
            self._follow()
