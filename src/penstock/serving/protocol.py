"""uvicorn's HTTP/1.1 connection: fewer and larger writes, and an end to two kinds of patience."""

from __future__ import annotations

import asyncio
import ssl
import time
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from penstock.serving import limits

STALLS = "penstock.stalls"
"""Where a request's scope has a list of when, and for how many seconds, its client had no room for what was written."""
MAX_STALLS = 64
CROWDED = "penstock.crowded"
"""In the scope of a request that came while there were too many connections: how many there may be."""


def secured(context: ssl.SSLContext, **given: Any) -> Handshake:
    """A connection that speaks TLS first; ``given`` as to ``Connection``."""
    return Handshake(Connection(**given), context)


class Handshake(SSLProtocol):
    """TLS under a Connection, which counts from the moment that TCP connects, and whose head must have arrived
    HEAD_SECONDS after that: asyncio has a client say nothing for a minute, and uvicorn does not see it meanwhile.
    """

    def __init__(self, connection: Connection, context: ssl.SSLContext) -> None:
        super().__init__(connection.loop, connection, context, None, server_side=True)  # type: ignore[arg-type]
        self._connection = connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        tcp = cast(asyncio.Transport, transport)
        if self._connection.surplus >= 0:  # nothing can be answered before the handshake
            tcp.abort()
        else:
            self._connection.begin(tcp)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connection.end()
        super().connection_lost(exc)


class Connection(H11Protocol):
    """Gives a request's head HEAD_SECONDS to arrive, and as long to a body after its answer; cuts off a client that has
    read nothing for STALL_SECONDS.

    uvicorn ends a connection that is silent between requests, but not one that sends its headers a byte at a time, nor
    the body of a request that was refused unread, nor one that never reads: each would hold a place among
    MAX_CONNECTIONS for ever, the last its request's too. uvicorn answers those above that number 503 by itself, with a
    text that no client of an API reads, and keeps them all: here the application is told to, and above
    REFUSED_CONNECTIONS they are closed.
    """

    _tcp: asyncio.Transport | None = None  # while TLS shakes hands over it
    _head: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _leaving: asyncio.TimerHandle | None = None
    _since = 0.0

    def __init__(self, config: uvicorn.Config, *args: Any, **given: Any) -> None:
        super().__init__(config, *args, **given)
        self.most, self.limit_concurrency = self.limit_concurrency or limits.MAX_CONNECTIONS, None
        self._own = self.app

    def begin(self, tcp: asyncio.Transport) -> None:
        """A handshake does."""
        self._tcp = tcp
        self.connections.add(self)
        self._wait_for_head()

    def end(self) -> None:
        """The TCP connection of a handshake has."""
        self._head = _stop(self._head)
        self.connections.discard(self)

    @property
    def surplus(self) -> int:
        """Connections above what there may be; below 0 there may be more."""
        return len(self.connections) - self.most

    def shutdown(self) -> None:
        if self._tcp is None:
            super().shutdown()
        else:
            self._abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._tcp = None
        super().connection_made(Joined(transport, self.loop, self._wait_for_reader))  # type: ignore[arg-type]
        self._wait_for_head()
        if self.surplus > limits.REFUSED_CONNECTIONS:
            self._abort()

    def data_received(self, data: bytes) -> None:
        unread = self.conn.our_state is h11.DONE
        super().data_received(data)
        if unread and self.conn.our_state is h11.IDLE:  # the body has ended, and a new head has all of its time
            self._head = _stop(self._head)
        if self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE:
            self._wait_for_head()
        else:
            self._head = _stop(self._head)

    def handle_events(self) -> None:
        """At most one request begins in it: a connection answers one at a time."""
        crowded = self.surplus >= 0 or len(self.tasks) >= self.most
        self.app = self._refused if crowded else self._own
        super().handle_events()

    async def _refused(self, scope: Any, receive: Any, send: Any) -> None:
        scope[CROWDED] = self.most
        await self._own(scope, receive, send)

    def on_response_complete(self) -> None:
        self._head = _stop(self._head)
        super().on_response_complete()
        if self.conn.our_state is h11.DONE:  # before the body was there: what comes of it is dropped
            self._wait_for_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._since = self._since or time.monotonic()
        self._stalled = self._stalled or self.loop.call_later(limits.STALL_SECONDS, self._abort)

    def resume_writing(self) -> None:
        self._note_stall()
        super().resume_writing()
        self._stalled = _stop(self._stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head, self._stalled, self._leaving = _stop(self._head), _stop(self._stalled), _stop(self._leaving)
        self._note_stall()
        super().connection_lost(exc)

    def _note_stall(self) -> None:
        """Whoever waited for the client is told before it goes on."""
        stalls = cast("dict[str, Any]", self.scope or {}).get(STALLS)
        if self._since and stalls is not None:
            seconds = time.monotonic() - self._since
            if len(stalls) < MAX_STALLS:
                stalls.append((self._since, seconds))
            else:  # the sum stays right
                stalls[-1] = (stalls[-1][0], stalls[-1][1] + seconds)
        self._since = 0.0

    def _wait_for_head(self) -> None:
        self._head = self._head or self.loop.call_later(limits.HEAD_SECONDS, self._abort)

    def _wait_for_reader(self, unread: int = 0) -> None:
        """The connection ends when its client has read what is left: too little for pause_writing, perhaps for ever."""
        left = self.transport.get_write_buffer_size()
        if left == unread:
            self._abort()
        else:
            self._leaving = self.loop.call_later(limits.STALL_SECONDS, self._wait_for_reader, left)

    def _abort(self) -> None:
        """What is still to be written is dropped: nobody reads it."""
        (self._tcp or self.transport).abort()


class Joined:
    """A transport that writes once a turn of the loop, all that was written in that turn.

    A write is a system call, which costs as much as making the event. When the loop is behind, several events of a
    stream are ready at once, and a head and its body always are.

    Args:
        closing: called when it closes before all is with the system.
    """

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, closing: Callable[[], None]
    ) -> None:
        self._transport, self._loop, self._closing = transport, loop, closing
        self._parts: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> None:
        if not data:
            return
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)
        self._size += len(data)
        if self._size > limits.JOINED_BYTES:  # the transport has to see it, to say when it is too much
            self._flush()

    def close(self) -> None:
        self._flush()
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self._closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _flush(self) -> None:
        if self._parts:
            parts, self._parts, self._size = self._parts, [], 0
            if not self._transport.is_closing():  # it may have been aborted since
                self._transport.write(parts[0] if len(parts) == 1 else b"".join(parts))


def _stop(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    if timer is not None:
        timer.cancel()
    return None
