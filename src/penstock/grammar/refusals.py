"""Why a form is refused, in words."""

from __future__ import annotations

import re

from penstock.base import InvalidRequest

MAX_DEPTH = 1_000
"""Levels of a schema or grammar, references followed. The grammar engine goes down them on the stack: near 3000 the
process would end."""

_OVER_LIMIT = re.compile(r"limits\.|fuel|max is \d|too (?:many|large|big)|limit (?:of|exceeded)")
"""How the grammar engine speaks of its limits."""


def refusal(code: str, what: str, error: ValueError, *, fix: str = "") -> InvalidRequest:
    """What the grammar engine says, as an error of its own code, or ``grammar_too_large``."""
    why = brief(error)
    if _OVER_LIMIT.search(why):
        return too_large(what.removesuffix(" cannot be compiled"), why)
    return InvalidRequest(code, what, why=why, fix=fix)


def too_large(what: str, why: str) -> InvalidRequest:
    fix = "make it shorter, with fewer alternatives and lower counts of repetition"
    return InvalidRequest("grammar_too_large", f"{what} costs too much", why=why, fix=fix)


def vet_levels(text: str) -> None:
    """Refuses a grammar in Lark, or a regular expression, that may be too deep.

    Raises:
        InvalidRequest: (grammar_too_large).
    """
    if (levels := sum(map(text.count, ":([{"))) > MAX_DEPTH:
        why = f"with its rules followed it may be {levels:,} levels deep, at most {MAX_DEPTH:,} are allowed"
        raise too_large("The grammar", why)


def brief(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:300]
