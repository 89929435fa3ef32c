"""What a route takes and gives, said where it is answered: the OpenAPI document is made of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import ASGIApp

from penstock.serving.gate import Access

Endpoint = Callable[[Request], Awaitable[ASGIApp]]
Routes = Mapping[str, tuple[Access, Endpoint] | tuple[Access, Endpoint, str]]
"""By path: what it asks of its caller where keys are set, who answers, and to which methods (GET)."""

IDEMPOTENCY_KEY = "Idempotency-Key"
KEY = r"[!-~]{1,255}"
"""What such a header may hold."""

PLAIN_TEXT = "text/plain"

E = TypeVar("E", bound=Endpoint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path.

    Attributes:
        says: what it does, in a line.
        takes: shape of the JSON in the body.
        form: shape of a form in the body instead.
        query: shape of the query, all of it optional.
        gives: shape of the JSON that answers, or several, or the media type of an answer that is none.
        streams: shapes of the JSON that an event may hold where the body says ``stream``; a text stands for itself.
        lines: the stream is of lines of JSON, and not of events.
        example: a body that works.
        once: a client may send it again under the same Idempotency-Key.
    """

    says: str
    takes: type | None = None
    form: type | None = None
    query: type | None = None
    gives: Any = None
    streams: tuple[Any, ...] = ()
    lines: bool = False
    example: Mapping[str, Any] | None = None
    once: bool = False

    @property
    def given(self) -> tuple[Any, ...]:
        return self.gives if isinstance(self.gives, tuple) else (self.gives,)


UNSAID = Operation(says="")
"""Of an endpoint that says nothing of itself."""

_SAID: dict[Endpoint, dict[str, Operation]] = {}


def operation(says: str, *, method: str | None = None, **shapes: Any) -> Callable[[E], E]:
    """Says it of an endpoint: as Operation, of POST if it takes a body and of GET if not. Of each method once."""
    said = Operation(says=says, **shapes)
    own = method or ("POST" if said.takes or said.form else "GET")

    def say(endpoint: E) -> E:
        _SAID.setdefault(endpoint, {})[own] = said
        return endpoint

    return say


def operations_of(endpoint: Endpoint) -> Mapping[str, Operation]:
    """By method."""
    return _SAID.get(endpoint, {})
