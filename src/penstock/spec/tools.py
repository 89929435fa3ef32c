"""Tools that a model may call, and how formats write calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that a model may call.

    Attributes:
        parameters: JSON schema of its arguments, as JSON text.
        strict: calls must be instances of the schema.
        text: its only argument is a text named ``input``, and follows this: "regex" or "lark", and the definition.
    """

    name: str
    parameters: str = '{"type":"object"}'
    strict: bool = False
    text: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Field:
    """How a format writes one argument, as plain text: what stands before it, a format string of ``key``; and after."""

    begin: str
    end: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallShape:
    """How a model writes calls, which a grammar makes it keep to: ``first``, calls with ``between``, ``last``.

    Attributes:
        begin: what stands before the arguments; a format string of ``name`` (in quotes) and ``bare_name``.
        end: what stands after them.
        trigger: with what ``first`` or ``begin`` starts and nothing else that is said; None if calls are plain JSON,
            which only the start of the text shows to be calls.
        field: how each argument is written, where they are not one JSON object.
        says: with what a text starts that calls nothing.
    """

    first: str
    begin: str
    end: str
    between: str
    last: str
    trigger: str | None
    field: Field | None = None
    says: str = ""
