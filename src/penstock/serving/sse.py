"""Server-sent events (WHATWG HTML, section 9.2), the subset OpenAI streams with, and clients that go away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from penstock.base import PenstockError
from penstock.serving import limits
from penstock.serving.errors import body_of, internal_error, log_fault

T = TypeVar("T")
_HEADERS = [
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_encode = msgspec.json.Encoder().encode
_log = logging.getLogger(__name__)


def event(chunk: object) -> bytes:
    return b"data: " + _encode(chunk) + b"\n\n"


def named(chunk: object) -> bytes:
    """An event with the name that its ``type`` says."""
    assert isinstance(chunk, dict)
    return f"event: {chunk['type']}\n".encode() + event(chunk)


class FaultEvent(TypedDict):
    """The last of a stream that an error ends, numbered as the others are."""

    type: Literal["error"]
    sequence_number: int
    code: str
    message: str
    param: str | None


def _fault_event(error: PenstockError, number: int) -> bytes:
    fault = body_of(error).error
    event = FaultEvent(type="error", sequence_number=number, code=fault.code, message=fault.message, param=fault.param)
    return named(event)


def comment(text: str) -> bytes:
    """What clients skip (WHATWG HTML, section 9.2.6)."""
    return f": {' '.join(text.split())}\n\n".encode()


@dataclass(frozen=True, slots=True)
class Dialect:
    """How an API writes its events, what comes after the last one, and an error that ends a stream.

    ``fault``: given the error and how many chunks came before it.
    ``remark``: what may stand between events, for proxies and people; None if its clients would take it for one.
    """

    encode: Callable[[object], bytes]
    last: bytes
    fault: Callable[[PenstockError, int], bytes]
    content_type: str = "text/event-stream; charset=utf-8"
    remark: Callable[[str], bytes] | None = comment


DONE = "[DONE]"
PLAIN = Dialect(event, f"data: {DONE}\n\n".encode(), lambda error, _: event(body_of(error)))
NAMED = Dialect(named, b"", _fault_event)


class EventStream:
    """A response that sends each chunk as one event, then what ends a stream.

    The first chunk is waited for, so that what fails before it is answered with a status of its own. Headers are sent
    before it only where the client is told something before it: how far its model is loaded, or after PING_SECONDS that
    the server is there. From then on an error is the last event.

    Args:
        begin: gives the chunks, once there is what they need.
        awaited: what a request without a chunk waits for; None if only for that, empty if it is not to be told yet.
    """

    def __init__(
        self,
        begin: Callable[[], Awaitable[AsyncGenerator[object, None]]],
        dialect: Dialect = PLAIN,
        awaited: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.begin, self.dialect, self.awaited = begin, dialect, awaited
        self._chunks: AsyncGenerator[object, None] | None = None
        self._begun = False
        self._sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._send(send))
        except ClientDisconnect:
            if not self._begun:
                raise

    async def _send(self, send: Send) -> None:
        last, pings = self.dialect.last, Pings(send, self.dialect)
        try:
            first = await self._first(send)
            await self._write(send, self.dialect.encode(first))
            self._sent = 1
            assert self._chunks is not None
            pings.begin()
            async for chunk in self._chunks:
                pings.heard = time.monotonic()
                await send({"type": "http.response.body", "body": self.dialect.encode(chunk), "more_body": True})
                self._sent += 1
        except PenstockError as error:
            if not self._begun:
                raise
            log_fault(error)
            last = self.dialect.fault(error, self._sent)
        except Exception:
            if not self._begun:
                raise
            _log.exception("a stream failed")
            last = self.dialect.fault(internal_error(), self._sent)
        finally:
            pings.end()
            if self._chunks is not None:
                await self._chunks.aclose()
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _write(self, send: Send, data: bytes) -> None:
        if not self._begun:
            self._begun = True
            headers = [(b"content-type", self.dialect.content_type.encode()), *_HEADERS]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _first(self, send: Send) -> object:
        """The first chunk. Until it is there, tells what it waits for."""

        async def first() -> object:
            self._chunks = await self.begin()
            return await anext(self._chunks)

        coming, spoke, remark = asyncio.ensure_future(first()), time.monotonic(), self.dialect.remark
        pause = None if remark is None else limits.TOLD_SECONDS
        try:
            while not (await asyncio.wait({coming}, timeout=pause))[0]:
                assert remark is not None
                text, silent = self.awaited(), time.monotonic() - spoke
                if text or silent >= limits.PING_SECONDS:
                    await self._write(send, remark(text or "ping"))
                    spoke, silent = time.monotonic(), 0.0
                pause = limits.TOLD_SECONDS if text is not None else limits.PING_SECONDS - silent
            return coming.result()
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


class Pings:
    """Has something said in a stream that has been silent for PING_SECONDS, or a proxy may take it for dead.

    A chunk only notes when it came: the one timer of a stream looks at that when it goes off.

    Attributes:
        heard: when the last chunk was written, by ``time.monotonic``.
    """

    def __init__(self, send: Send, dialect: Dialect) -> None:
        self.heard = 0.0
        self._send, self._remark = send, dialect.remark
        self._said: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        self.heard = time.monotonic()
        if self._remark is not None:
            self._timer = asyncio.get_running_loop().call_later(limits.PING_SECONDS, self._look)

    def end(self) -> None:
        """Nothing is said any more, not even what waits for its client to read."""
        for each in (self._timer, self._said):
            if each is not None:
                each.cancel()

    def _look(self) -> None:
        assert self._remark is not None
        silent = time.monotonic() - self.heard
        if silent >= limits.PING_SECONDS:
            self.heard, silent = time.monotonic(), 0.0
            if self._said is None or self._said.done():
                said = {"type": "http.response.body", "body": self._remark("ping"), "more_body": True}
                self._said = asyncio.ensure_future(self._send(said))
        self._timer = asyncio.get_running_loop().call_later(limits.PING_SECONDS - silent, self._look)


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Awaits work on a request whose body has been read, and cancels it when the client goes away.

    Raises:
        ClientDisconnect: it went away; by then the work has been cancelled and has cleaned up.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
