"""Responses and conversations that are kept, as the event loop asks for them: it never waits for the disk itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from penstock.base import Unavailable
from penstock.serving.conversation_table import ConversationTable
from penstock.serving.database import Database
from penstock.serving.errors import HTTPError
from penstock.serving.gate import current
from penstock.serving.response_table import IN_MEMORY, ResponseTable, Stored
from penstock.serving.store import Store

_log = logging.getLogger(__name__)


class Kept:
    """What the callers' tenants have had kept.

    Args:
        open: the store of the server. Raises Unavailable: (store_in_use), (store_unusable).

    Attributes:
        turns: those of responses that are being made, by tenant and conversation.
    """

    def __init__(self, open: Callable[[], Awaitable[Store]]) -> None:
        self._open = open
        self._memory: ResponseTable | None = None
        self.turns: dict[tuple[str, str], Turn] = {}

    async def responses(self) -> ResponseTable:
        """In memory if the store cannot be opened when it is first needed, and then as long as the process lives: a
        client that goes on from one finds it where it was put."""
        if self._memory is None:
            try:
                return (await self._open()).responses
            except Unavailable:
                memory = await asyncio.to_thread(Database, None)
                if self._memory is None:
                    _log.warning("responses are kept in memory, and end with this process")
                    self._memory = ResponseTable(memory, IN_MEMORY)
        return self._memory

    async def conversations(self) -> ConversationTable:
        """Nowhere but on the disk: they last until they are deleted. Raises Unavailable: (store_in_use), ..."""
        return (await self._open()).conversations

    async def keep(self, stored: Stored) -> bool:
        """Whether it is: it may be too large, or the disk fail, of which the log tells."""
        table, tenant = await self.responses(), current.get().tenant
        try:
            return await asyncio.to_thread(table.keep, tenant, stored)
        except Unavailable:  # it has been told
            return False

    def turn(self, conversation: str) -> Turn:
        """Raises HTTPError: (conversation_locked) another response has its turn."""
        self.check_free(conversation)
        caller = current.get()
        turn = self.turns[caller.tenant, conversation] = Turn(self, caller.tenant, conversation)
        caller.let_go.append(turn.end)
        return turn

    def check_free(self, conversation: str) -> None:
        """Raises HTTPError: (conversation_locked)."""
        if (current.get().tenant, conversation) in self.turns:
            raise HTTPError(  # 400 and not 409, as OpenAI's API answers: its clients look for that
                "conversation_locked",
                "Another response is being made in this conversation",
                fix="send it again when that one has ended",
                param="conversation",
            )


class Turn:
    """A response's own in a conversation: until it ends, no other begins in it, and nothing else changes its items.

    It ends with its request, whatever becomes of that; but what it adds is on the disk by then.
    """

    def __init__(self, kept: Kept, tenant: str, conversation: str) -> None:
        self._kept, self._key = kept, (tenant, conversation)
        self._adding: asyncio.Future[bool] | None = None

    async def add(self, stored: Stored) -> bool:
        """What the response was given, and its output. False if the disk fails, of which the log tells, or the
        conversation is gone."""
        table = await self._kept.conversations()
        work = partial(_add, table, *self._key, stored)
        self._adding = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            return await asyncio.shield(self._adding)
        except Unavailable:  # it has been told
            return False
        finally:
            self.end()

    def end(self) -> None:
        """May be asked again and again."""
        if self._adding is not None and not self._adding.done():
            self._adding.add_done_callback(lambda _: self.end())
        elif self._kept.turns.get(self._key) is self:
            del self._kept.turns[self._key]


def _add(table: ConversationTable, tenant: str, id: str, stored: Stored) -> bool:
    return table.end_turn(tenant, id, stored.turn)
