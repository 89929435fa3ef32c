"""The outermost layer: who may speak to this server, how much, and under which request id."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.base import Unavailable
from penstock.serving import limits
from penstock.serving.context import Context
from penstock.serving.errors import AnthropicErrorBody, HTTPError, error_response, internal_error, shape_of_errors
from penstock.serving.errors import request_id as current_id
from penstock.serving.gate import Caller, current
from penstock.serving.history import Visit
from penstock.serving.limits import (
    BODY_SECONDS,
    INLINE_BYTES,
    LONG_BYTES,
    MAX_BODY_BYTES,
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_JSON_DEPTH,
)
from penstock.serving.protocol import CROWDED, STALLS
from penstock.serving.requestlog import line_of

T = TypeVar("T")
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})

PROBES = frozenset({"page", "requests", "live", "ready", "health", "metrics", "status", "debug"})
"""First parts of paths that are asked for all the time: probes, and the dashboard."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_PORT = re.compile(r":\d{0,5}$")
_LONG = ThreadPoolExecutor(1, "penstock-long")
_log = logging.getLogger(__name__)


class Edge:
    """Wraps the whole application.

    Args:
        context: its gate knows who is asking, and who has no good key gets no further than here; its log has a line for
            each request but probes that were answered.
        hosts: names a Host header may carry, without port; None for any. A server on loopback needs the list:
            a web page can point its own name at 127.0.0.1 (DNS rebinding) but cannot forge this header.
        public: paths that need no key.
    """

    def __init__(self, app: ASGIApp, context: Context, *, hosts: frozenset[str] | None, public: frozenset[str]) -> None:
        self.app, self.context, self.hosts, self.public = app, context, hosts, public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        request_id = _request_id(headers)
        caller = self.context.gate.caller(headers, request_id)
        caller.stalls = scope.setdefault(STALLS, caller.stalls)
        current.set(caller)
        current_id.set(request_id)
        names = [b"x-request-id"]
        if shape_of_errors(scope["path"]) is AnthropicErrorBody:
            names.append(b"request-id")  # where Anthropic's clients look for it
        started = 0

        async def send_named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = message["status"]
                own = [*((name, request_id.encode("ascii")) for name in names), *caller.allowances()]
                if self.context.draining or CROWDED in scope:  # a client shall not come back on a connection that ends
                    own.append((b"connection", b"close"))
                message["headers"] = [*message["headers"], *own]
                self.context.metrics.count(scope["path"], message["status"])
            await send(message)

        try:
            if (most := scope.get(CROWDED)) is not None:
                raise too_many_connections(most)
            self._admit(headers)
            self._refuse_pages(scope["method"], headers)
            if scope["path"] not in self.public:
                caller.require("inference")
            await self.app(scope, receive, send_named)
        except (HTTPError, Unavailable) as error:
            await error_response(error, scope["path"])(scope, receive, send_named)
        except Exception:
            _log.exception("request %s failed", request_id)
            if not started:
                await error_response(internal_error(), scope["path"])(scope, receive, send_named)
        finally:
            caller.leave()
            self._note(caller, scope["path"], started or 499, headers)

    def _note(self, caller: Caller, path: str, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Puts a request that has ended into the books. 499: its client was gone before it was answered (nginx)."""
        self.context.metrics.account(caller, status)
        line = line_of(caller, path, status)
        if caller.visit is not None:
            visit = Visit.of(caller, line)
            self.context.history.add(visit, caller.texts)
            if line.admitted_s is not None:
                self.context.metrics.spent(line)
            if self.context.spans is not None:
                self.context.spans.add(visit, headers)
        probe = path == "/" or path.startswith("/v2/health/") or not PROBES.isdisjoint(path.split("/", 2)[1:2])
        if self.context.log is not None and (not probe or status in (401, 403)):
            self.context.log.add(line)

    def _admit(self, headers: list[tuple[bytes, bytes]]) -> None:
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            raise HTTPError(
                "headers_too_large",
                "The request carries too many headers",
                why=f"{len(headers)} headers of {size} bytes; at most {MAX_HEADERS} of {MAX_HEADER_BYTES}",
                fix="send fewer, such as no cookies",
                status=431,
            )
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
            raise HTTPError(  # of two lengths a proxy may believe the other (request smuggling, RFC 9112, 6.1)
                "ambiguous_length",
                "The body has two lengths",
                why="both Content-Length and Transfer-Encoding are given",
                fix="send one of them",
            )
        named = [value.decode("latin-1").lower() for name, value in headers if name == b"host"]
        if self.hosts is not None and (len(named) != 1 or _PORT.sub("", named[0]) not in self.hosts):
            raise HTTPError(
                "host_not_allowed",
                "This server listens on loopback and answers only to its own name",
                fix=f"use one of {', '.join(sorted(self.hosts))} as the host, or start it with --host",
                status=403,
            )

    def _refuse_pages(self, method: str, headers: list[tuple[bytes, bytes]]) -> None:
        """A browser sends a form, a text or nothing at all for a page of any site without asking first, but says from
        where (Fetch Standard, "Origin header"). For JSON, and for other methods, it asks (``transport.shared_with``).
        """
        told = {name: value.decode("latin-1") for name, value in headers if name in (b"origin", b"host")}
        if method != "POST" or (origin := told.get(b"origin")) is None or is_json(headers):
            return
        if origin not in self.context.origins and origin.partition("://")[2] != told.get(b"host"):
            raise HTTPError(
                "origin_not_allowed",
                "Pages of other sites may not send this",
                why=f"this one is of {origin[:80]}",
                fix="serve with --cors-origin and the page's origin",
                status=403,
            )


def too_many_connections(most: int) -> Unavailable:
    return Unavailable(
        "too_many_connections",
        "The server has as many connections as it takes",
        why=f"{most} of them",
        fix="send it again in a few seconds, and keep fewer connections",
        retry_after=2.0,
    )


def is_json(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """The body is declared to be."""
    declared = next((value for name, value in headers if name == b"content-type"), b"")
    return declared.partition(b";")[0].strip().lower() == b"application/json"


def _request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's own x-request-id if it is a plain one, else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(text := value.decode("latin-1")):
            return text
    return uuid.uuid4().hex


@asynccontextmanager
async def body_of(request: Request) -> AsyncIterator[bytes]:
    """The whole body, at most MAX_BODY_BYTES of it, within BODY_SECONDS.

    Its place in memory it has until its caller is charged or leaves: the text of it may wait to be tokenized.

    Raises:
        Unavailable: (uploads_full) the bodies of others take up MAX_UPLOADING bytes; small ones always have a place.
        HTTPError: 413, 408, or 415 unless it is declared to be JSON. A browser sends other types across
            origins without asking first, so the declaration is also what keeps web pages out. Ollama's clients declare
            whatever they like, and are read unless they may be a browser.
    """
    if not is_json(request.headers.raw) and (not request.scope["path"].startswith("/api/") or _may_be_a_page(request)):
        raise HTTPError(
            "unsupported_media_type",
            "The body is not declared to be JSON",
            fix="send the header Content-Type: application/json",
            status=415,
        )
    if int(request.headers.get("content-length", "0")) > MAX_BODY_BYTES:  # the HTTP parser saw to the digits
        raise _body_too_large()
    caller, body = current.get(), bytearray()
    try:
        try:
            async with asyncio.timeout(BODY_SECONDS):
                await _read(request, body, caller)
        except TimeoutError:
            why, fix = f"waited {BODY_SECONDS:g} s", "send it again, over a faster connection or in parts"
            raise HTTPError(
                "request_timeout", "The body did not arrive in time", why=why, fix=fix, status=408
            ) from None
        yield bytes(body)
    except BaseException:
        caller.put_down()
        raise


def _may_be_a_page(request: Request) -> bool:
    """A browser that sends a POST for a page of another site says from where (Fetch Standard, "Origin header")."""
    return "origin" in request.headers or "sec-fetch-site" in request.headers


async def _read(request: Request, body: bytearray, caller: Caller) -> None:
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received <= MAX_BODY_BYTES:
            more = max(0, received - INLINE_BYTES) - caller.body
            if caller.gate.uploading + more > limits.MAX_UPLOADING:
                raise Unavailable(
                    "uploads_full",
                    "The server is reading as much as it takes on",
                    why=f"{caller.gate.uploading} of {limits.MAX_UPLOADING} bytes of bodies",
                    fix="send it again in a few seconds",
                    retry_after=2.0,
                )
            caller.gate.uploading += more
            caller.body += more
            body += chunk
        elif received > 4 * MAX_BODY_BYTES:
            break  # up to here it was drained, so that a client busy sending gets to read the answer
    if received > MAX_BODY_BYTES:
        raise _body_too_large()


def _body_too_large() -> HTTPError:
    return HTTPError(
        "body_too_large",
        "The request body is too large",
        why=f"more than {MAX_BODY_BYTES} bytes",
        fix="send less text in one request",
        status=413,
    )


def as_json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """Runs work on ``size`` bytes here if that is quick, else in a thread; what is long in one and the same, so that
    the loop has only one to wait for when it wants the interpreter back."""
    if size <= INLINE_BYTES:
        return work()
    if size <= LONG_BYTES:
        return await asyncio.to_thread(work)
    return await asyncio.get_running_loop().run_in_executor(_LONG, work)


def unescaped(body: bytes) -> Iterator[npt.NDArray[np.uint8]]:
    """JSON without its escapes, a piece at a time, so that others have a turn of the interpreter in between."""
    start = 0
    while start < len(body):
        piece = body[start : start + INLINE_BYTES]
        end = start + len(piece) + (len(piece) - len(piece.rstrip(b"\\"))) % 2  # what is escaped belongs to its escape
        yield np.frombuffer(body[start:end].replace(b"\\\\", b"  ").replace(b'\\"', b"  "), np.uint8)
        start = end


def nested_too_deeply(body: bytes) -> bool:
    """Whether JSON has more than MAX_JSON_DEPTH brackets open at a time. Told before anything recurses."""
    if body.count(b"[") + body.count(b"{") <= MAX_JSON_DEPTH:
        return False
    depth, quoted = 0, False
    for text in unescaped(body):
        steps = ((text == ord("[")) | (text == ord("{"))).astype(np.int8)
        steps -= (text == ord("]")) | (text == ord("}"))
        inside = np.bitwise_xor.accumulate(text == ord('"')) ^ quoted
        steps[inside] = 0  # between quotes they are text
        depths = np.cumsum(steps, dtype=np.int32)
        if depth + int(depths.max()) > MAX_JSON_DEPTH:
            return True
        depth, quoted = depth + int(depths[-1]), bool(inside[-1])
    return False


_PATH = re.compile(r"^(?P<text>.*) - at (?:`key` in )?`\$(?P<path>[^`]*)`$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_PLAIN = re.compile(r"(Expected `[^`]{1,80}`( (<=|>=|<|>) [-\d.]+| of length (<=|>=) \d+)?(, got `[^`]{1,40}`)?)")


def settle(*others: type) -> None:
    """Has msgspec look at every struct that there is, and at other classes that it reads, before there are threads.

    It does so when a class is first read, bit by bit: a second thread that reads it at that moment finds what is not
    there yet, and the process ends (0.22; likely enough with short turns of the interpreter).
    """
    for each in (*_structs(msgspec.Struct), *others):
        with suppress(TypeError):  # of those that are written alone, some can be read by nobody
            msgspec.json.Decoder(each)


def _structs(base: type[msgspec.Struct]) -> Iterator[type[msgspec.Struct]]:
    for each in base.__subclasses__():
        yield each
        yield from _structs(each)


def parse(body: bytes, shape: type[T]) -> T:
    """Decodes JSON of a declared shape.

    Raises:
        HTTPError: (invalid_json) not JSON, or nested too deeply; (invalid_parameter) a field that is missing,
            of the wrong type or out of its range, named.
    """
    if nested_too_deeply(body):
        why = f"more than {MAX_JSON_DEPTH} brackets within brackets"
        raise HTTPError("invalid_json", "The body is nested too deeply", why=why, fix="flatten it")
    try:
        return msgspec.json.decode(body, type=shape)
    except msgspec.ValidationError as error:
        raise _misfit(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise HTTPError("invalid_json", "The body is not valid JSON", fix="check quotes, commas and UTF-8") from None


def shaped(fields: Mapping[str, object], shape: type[T]) -> T:
    """As ``parse``, of what was parsed already. Raises HTTPError: (invalid_parameter)."""
    try:
        return msgspec.convert(fields, shape, str_keys=True)
    except msgspec.ValidationError as error:
        raise _misfit(error) from None


def _misfit(error: msgspec.ValidationError) -> HTTPError:
    found = _PATH.match(str(error))
    text, path = (found["text"], found["path"].lstrip(".")) if found else (str(error), "")
    if missing := _MISSING.fullmatch(text):
        path = f"{path}.{missing[1]}".lstrip(".")
        return HTTPError("invalid_parameter", f"{path} is required", param=path)
    plain = _PLAIN.fullmatch(text)
    return HTTPError(
        "invalid_parameter",
        f"{path or 'The body'} has the wrong type or is out of range",
        why=plain[0].replace("`", "") if plain else "",
        param=path or None,
    )
