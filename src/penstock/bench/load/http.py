"""The client's half of HTTP/1.1 (RFC 9112): requests with a body of JSON, answers as they arrive.

The wheel is invented again for its weight: on this project's machine an event of a stream costs 31 us of processor time
here, 50 with h11 and 88 with httpx, JSON included; a client that takes a core away from the server measures itself. A
test holds it against h11 on answers cut at any byte.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from penstock.base import InvalidRequest

MAX_HEAD = 64 << 10
Arrived = Callable[[float, bytes], None]
"""Called with the time and a part of the body."""


class Broken(Exception):
    """The connection ended or what came is not HTTP. ``code`` counts it among the errors."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class ResponseParser:
    """One answer, fed in any pieces. ``on_body`` gets its body, framing removed.

    Attributes:
        status: 0 until the head is complete. Interim answers (1xx) are passed over.
        done: all of it is here.
        reusable: another request may follow on the connection.
    """

    def __init__(self, on_body: Callable[[bytes], None]) -> None:
        self._on_body = on_body
        self._buffer = b""
        self._left = 0
        self._read: Callable[[], bool] = self._head
        self.status, self.done, self.reusable = 0, False, True
        self.headers: dict[str, str] = {}

    def feed(self, data: bytes) -> None:
        """Raises Broken: (bad_response) this is not HTTP."""
        self._buffer += data
        while not self.done and self._read():
            pass

    def end(self) -> None:
        """The other side has closed. Raises Broken: (connection_lost) before the answer was complete."""
        if self._read != self._rest:
            raise Broken("connection_lost")
        self.done, self.reusable = True, False

    def _head(self) -> bool:
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            if len(head) > MAX_HEAD:
                raise Broken("bad_response")
            return False
        lines = head.decode("latin-1").split("\r\n")
        version, _, status = lines[0].partition(" ")
        if not version.startswith("HTTP/1.") or not status[:3].isdecimal():
            raise Broken("bad_response")
        self._buffer = rest
        if status.startswith("1"):
            return True
        self.status = int(status[:3])
        self.headers = {n.strip().lower(): v.strip() for n, _, v in (line.partition(":") for line in lines[1:])}
        said = self.headers.get("connection", "").lower()
        self.reusable = said != "close" and (version != "HTTP/1.0" or said == "keep-alive")
        length = self.headers.get("content-length", "")
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._read = self._chunk
        elif length or self.status in (204, 304):
            if not (length or "0").isdecimal():
                raise Broken("bad_response")
            self._left, self._read = int(length or 0), self._sized
        else:
            self._read = self._rest
        return True

    def _chunk(self) -> bool:
        line, found, rest = self._buffer.partition(b"\r\n")
        if not found:
            return False
        try:
            size = int(line.partition(b";")[0], 16)
        except ValueError:
            raise Broken("bad_response") from None
        if size == 0:
            self._read = self._trailers
            self._buffer = rest
        elif len(rest) < size + 2:
            return False
        else:
            self._on_body(rest[:size])
            self._buffer = rest[size + 2 :]
        return True

    def _trailers(self) -> bool:
        line, found, rest = self._buffer.partition(b"\r\n")
        if found:
            self._buffer, self.done = rest, not line
        return bool(found)

    def _sized(self) -> bool:
        part, self._buffer = self._buffer[: self._left], self._buffer[self._left :]
        self._left -= len(part)
        if part:
            self._on_body(part)
        self.done = self._left == 0
        return False

    def _rest(self) -> bool:
        part, self._buffer = self._buffer, b""
        if part:
            self._on_body(part)
        return False


class _Connection(asyncio.Protocol):
    """One request at a time."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._parser: ResponseParser | None = None
        self._answer: asyncio.Future[ResponseParser] | None = None
        self._now = 0.0
        self.open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    async def exchange(self, request: bytes, arrived: Arrived) -> ResponseParser:
        """Raises Broken."""
        self._parser = ResponseParser(lambda part: arrived(self._now, part))
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        try:
            return await self._answer
        finally:
            self._parser = self._answer = None

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        self._advance(lambda parser: parser.feed(data))

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self._advance(ResponseParser.end)

    def _advance(self, step: Callable[[ResponseParser], None]) -> None:
        parser, answer = self._parser, self._answer
        if parser is None or answer is None or answer.done():
            self.transport.close()  # nobody asked
            return
        try:
            step(parser)
        except Broken as error:
            answer.set_exception(error)
            self.transport.close()
            return
        if parser.done:
            answer.set_result(parser)


@dataclass
class HttpClient:
    """Requests to one server. Connections are kept and used again; there are as many as requests at a time.

    Attributes:
        prefix: of all paths, such as "/v1".
    """

    host: str
    port: int
    prefix: str
    key: str = ""
    tls: ssl.SSLContext | None = None
    _free: list[_Connection] = field(default_factory=list)

    @property
    def local(self) -> bool:
        return self.host in ("localhost", "127.0.0.1", "::1")

    async def request(self, method: str, path: str, body: bytes, arrived: Arrived) -> ResponseParser:
        """Raises Broken: connect_failed, connection_lost, bad_response. A cancelled request closes its connection."""
        connection = await self._connection()
        try:
            answer = await connection.exchange(self._head(method, path, len(body)) + body, arrived)
        except BaseException:
            connection.transport.abort()
            raise
        if answer.reusable and connection.open:
            self._free.append(connection)
        else:
            connection.transport.close()
        return answer

    async def close(self) -> None:
        for connection in self._free:
            connection.transport.abort()
        self._free.clear()
        await asyncio.sleep(0)

    async def _connection(self) -> _Connection:
        while self._free:
            if (kept := self._free.pop()).open:
                return kept
        try:
            return (
                await asyncio.get_running_loop().create_connection(_Connection, self.host, self.port, ssl=self.tls)
            )[1]
        except (OSError, UnicodeError):  # the latter of a name that cannot be one
            raise Broken("connect_failed") from None

    def _head(self, method: str, path: str, length: int) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"host: {host}:{self.port}", f"content-length: {length}"]
        lines += ["content-type: application/json", *([f"authorization: Bearer {self.key}"] if self.key else [])]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


def client_of(url: str, key: str = "") -> HttpClient:
    """A client of the server at a URL such as http://host:8000, with or without /v1.

    Raises:
        InvalidRequest: (invalid_parameter) it is no http or https URL, or the key cannot stand in a header.
    """
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or not f"{parts.path}{key}".isascii():
        why = "it must be like http://127.0.0.1:8000, and a key be of ASCII"
        raise InvalidRequest("invalid_parameter", f"--url {url!r} cannot be used", why=why)
    if any(c in f"{parts.path}{key}" for c in " \r\n"):
        raise InvalidRequest("invalid_parameter", "--url and --api-key hold no spaces or line breaks")
    path = parts.path.rstrip("/")
    return HttpClient(
        host=parts.hostname,
        port=port or (443 if parts.scheme == "https" else 80),
        prefix=path if path.endswith("/v1") else f"{path}/v1",
        key=key,
        tls=ssl.create_default_context() if parts.scheme == "https" else None,
    )
