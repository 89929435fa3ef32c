"""Errors as OpenAI clients expect them: ``{"error": {"message", "type", "param", "code"}}``.

A client sees texts that were written for it: those of PenstockError. The text of any other exception goes to the log.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable
from contextvars import ContextVar
from math import ceil
from typing import Any, Literal, TypedDict

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from penstock.base import ContextOverflow, InvalidRequest, PenstockError, Unavailable
from penstock.serving.limits import MAX_ERROR_CHARS

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 503: "overloaded_error"}
_ANTHROPIC = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_PLAIN = ("/api/", "/v2/")
_log = logging.getLogger(__name__)
_PARAMETER = re.compile(r"(\w+) = ")

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request that the running task works on. The edge sets it."""


class HTTPError(InvalidRequest):
    """A request refused at the edge, with its own HTTP status and the parameter at fault."""

    def __init__(
        self, code: str, what: str, *, why: str = "", fix: str = "", param: str | None = None, status: int = 400
    ) -> None:
        super().__init__(code, what, why=why, fix=fix)
        self.param, self.status = param, status


class Fault(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct):
    error: Fault


class AnthropicFault(TypedDict):
    type: str
    message: str


class PlainErrorBody(TypedDict):
    """As clients of Ollama and of the Open Inference Protocol expect it: a text. What is beside it is for people."""

    error: str
    code: str
    param: str | None


class AnthropicErrorBody(TypedDict):
    type: Literal["error"]
    error: AnthropicFault
    request_id: str | None


def unsupported(param: str, *, what: str = "") -> HTTPError:
    return HTTPError(
        "unsupported_parameter",
        what or f"{param} is not supported by this server",
        fix="leave it out",
        param=param,
    )


def invalid(param: str, why: str) -> HTTPError:
    return HTTPError("invalid_parameter", f"{param} cannot be used", why=why, param=param)


def internal_error() -> PenstockError:
    return PenstockError("internal_error", "The server failed to handle this request", fix="report its x-request-id")


def body_of(error: PenstockError) -> ErrorBody:
    """The client is told the causes of its own faults; the causes of ours are for the log."""
    message = f"{error.what} [{error.code}]" if _is_ours(error) else str(error)
    if len(message) > MAX_ERROR_CHARS:
        message = message[: MAX_ERROR_CHARS // 2] + " ... " + message[-MAX_ERROR_CHARS // 2 :]
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    code = "context_length_exceeded" if isinstance(error, ContextOverflow) else error.code  # as clients look for it
    return ErrorBody(Fault(message, kind, param_of(error), code))


def anthropic_body(error: PenstockError) -> AnthropicErrorBody:
    """As Anthropic's clients expect it; the code stays at the end of the message. Of a prompt that is too long they
    look for these words, to make the conversation shorter.
    """
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    message = body_of(error).error.message
    if isinstance(error, ContextOverflow) and error.tokens is not None:
        found = f"prompt is too long: {error.tokens} tokens > {error.most} maximum"
        message = found + message.removeprefix(error.what)
    fault: AnthropicFault = {"type": kind, "message": message}
    return {"type": "error", "error": fault, "request_id": request_id.get()}


def shape_of_errors(path: str) -> type:
    """Of the body that ``error_response`` makes."""
    if f"{path}/".startswith(_PLAIN):
        return PlainErrorBody
    return AnthropicErrorBody if f"{path}/".startswith(f"{_ANTHROPIC}/") else ErrorBody


def plain_body(error: PenstockError) -> PlainErrorBody:
    fault = body_of(error).error
    return {"error": fault.message, "code": error.code, "param": fault.param}


_BODIES: dict[type, Callable[[PenstockError], Any]] = {AnthropicErrorBody: anthropic_body, PlainErrorBody: plain_body}


def log_fault(error: PenstockError) -> None:
    if _is_ours(error):
        _log.error("%s", error)


def _is_ours(error: PenstockError) -> bool:
    return error.status >= 500 and error.status != 503


def param_of(error: PenstockError) -> str | None:
    if isinstance(error, HTTPError):
        return error.param
    match = _PARAMETER.match(error.what) if error.code == "invalid_parameter" else None
    return match[1] if match else None


def _seconds(error: Unavailable) -> int:
    """Spread over a quarter more, so that those refused together come back apart. A limit must be over by then; where
    the time is an estimate, rounding up would leave a second in which nobody comes."""
    seconds = error.retry_after * random.uniform(1.0, 1.25)
    return max(1, ceil(seconds) if error.status == 429 else int(seconds + random.random()))


def error_response(error: PenstockError, path: str) -> Response:
    """In the form of the API that ``path`` belongs to."""
    body = _BODIES.get(shape_of_errors(path), body_of)(error)
    return Response(msgspec.json.encode(body), error.status, headers_of(error), "application/json")


def headers_of(error: PenstockError) -> dict[str, str]:
    if isinstance(error, Unavailable):
        return {"retry-after": str(_seconds(error))}
    if error.code == "request_quarantined":  # official clients send what got a 500 again at once, unless told
        return {"x-should-retry": "false"}
    return {"www-authenticate": "Bearer"} if error.status == 401 else {}


async def on_penstock_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PenstockError)
    log_fault(error)
    return error_response(error, request.url.path)


async def on_disconnect(_: Request, __: Exception) -> Response:
    """Nobody reads it; the status is for the metrics (nginx's number)."""
    return Response(status_code=499)


async def on_other_exception(request: Request, _: Exception) -> Response:
    """The exception itself goes on to the edge, which logs it."""
    return error_response(internal_error(), request.url.path)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such route, wrong method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        fix = f"use {(error.headers or {}).get('Allow', 'another')}"
        refusal = HTTPError("method_not_allowed", "This path does not take this method", fix=fix, status=405)
    else:
        fix = "GET /openapi.json has every path that there is"
        refusal = HTTPError("unknown_path", "There is nothing at this path", fix=fix, status=404)
    response = error_response(refusal, request.url.path)
    response.headers.update(error.headers or {})
    return response
