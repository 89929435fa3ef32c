"""Server-sent events (WHATWG HTML, section 9.2), the subset OpenAI streams with, and clients that go away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from penstock.base import PenstockError
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
    type: Literal["error"]
    code: str
    message: str
    param: str | None


def _fault_event(error: PenstockError) -> bytes:
    fault = body_of(error).error
    return named(FaultEvent(type="error", code=fault.code, message=fault.message, param=fault.param))


@dataclass(frozen=True, slots=True)
class Dialect:
    """How an API writes its events, what comes after the last one, and an error that ends a stream."""

    encode: Callable[[object], bytes]
    last: bytes
    fault: Callable[[PenstockError], bytes]
    content_type: str = "text/event-stream; charset=utf-8"


DONE = "[DONE]"
PLAIN = Dialect(event, f"data: {DONE}\n\n".encode(), lambda error: event(body_of(error)))
NAMED = Dialect(named, b"", _fault_event)


class EventStream:
    """A response that sends each chunk as one event, then what ends a stream; an error becomes the last event instead.

    The first chunk has been waited for, so that what fails before it is answered with a status of its own.
    """

    def __init__(self, first: object, rest: AsyncGenerator[object, None], dialect: Dialect = PLAIN) -> None:
        self.first, self.rest, self.dialect = first, rest, dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.rest):
            with suppress(ClientDisconnect):
                await unless_disconnected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        headers = [(b"content-type", self.dialect.content_type.encode()), *_HEADERS]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        last = self.dialect.last
        try:
            await send({"type": "http.response.body", "body": self.dialect.encode(self.first), "more_body": True})
            async for chunk in self.rest:
                await send({"type": "http.response.body", "body": self.dialect.encode(chunk), "more_body": True})
        except PenstockError as error:
            log_fault(error)
            last = self.dialect.fault(error)
        except Exception:
            _log.exception("a stream failed")
            last = self.dialect.fault(internal_error())
        await send({"type": "http.response.body", "body": last, "more_body": False})


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
