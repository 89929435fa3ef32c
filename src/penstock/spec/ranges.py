"""Checks of what a caller gave: each value is of the right kind and in its range, or is named with its limits."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence, Sized
from itertools import chain
from typing import Any

from penstock.base import InvalidRequest

MAX_ID = 2**31 - 1


def invalid(name: str, value: object, why: str) -> InvalidRequest:
    return InvalidRequest("invalid_parameter", f"{name} = {reprlib.repr(value)} cannot be used", why=why)


def integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise invalid(name, value, f"it must be an integer from {low} to {high}")


def real(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> float:
    """As a float: a numpy scalar would not survive a recording."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not low <= value <= high or (open_low and value == low):  # type: ignore[operator]
        bracket = "(" if open_low else "["
        raise invalid(name, value, f"it must be a number in {bracket}{low:g}, {high:g}]")
    return float(value)  # type: ignore[arg-type]


def at_most(name: str, entries: Sized, most: int) -> None:
    if len(entries) > most:
        raise invalid(name, entries, f"it has {len(entries)} entries, at most {most} are allowed")


def entries(name: str, value: object, most: int, what: str) -> tuple[Any, ...]:
    """Of any iterable but text and mappings; none for None."""
    if value is None:
        return ()
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        raise invalid(name, value, f"it must be a list of {what}")
    found = tuple(value)
    at_most(name, found, most)
    return found


def strings(name: str, value: object, most: int, longest: int) -> tuple[str, ...]:
    found = entries(name, value, most, "strings")
    for string in found:
        if not isinstance(string, str):
            raise invalid(name, string, "it must be a string")
        if not 0 < len(string) <= longest:
            raise invalid(name, string, f"it has {len(string)} characters, not 1 to {longest}")
    return found


def token_ids(name: str, value: object, most: int) -> tuple[int, ...]:
    found = entries(name, value, most, "token ids")
    _check_ids(name, found)
    return found


def token_lists(name: str, value: object, most: int, longest: int) -> tuple[tuple[int, ...], ...]:
    """Of token ids, none of them empty."""
    found = tuple(entries(name, ids, longest, "token ids") for ids in entries(name, value, most, "lists of token ids"))
    if () in found:
        raise invalid(name, value, "a list in it is empty")
    _check_ids(name, [token for ids in found for token in ids])
    return found


def _check_ids(name: str, ids: Sequence[Any]) -> None:
    if {int}.issuperset(map(type, ids)) and min(ids, default=0) >= 0 and max(ids, default=0) <= MAX_ID:
        return  # the usual case, fast even for a whole vocabulary
    for token in ids:
        integer(name, token, 0, MAX_ID)


def extent(value: object, longest: int, deepest: int | None = None) -> tuple[int, int]:
    """(how deep lists and objects nest in it, characters that it has as JSON at the least), of what JSON can hold.

    Level by level, and no further once one of the two is above its most: neither what is large nor a cycle is looked at
    to its end, nor is any character.
    """
    depth = chars = 0
    level = [value]
    while level:
        inner = [each for each in level if isinstance(each, (dict, list, tuple))]
        depth += bool(inner)
        chars += sum(map(len, inner)) + sum(len(each) for each in level if isinstance(each, str))
        if chars > longest or (deepest is not None and depth > deepest):
            break
        level = list(chain.from_iterable(map(_parts, inner)))
    return depth, chars


def _parts(value: Any) -> Iterable[object]:
    return chain(value, value.values()) if isinstance(value, dict) else value


def as_json(name: str, value: object, longest: int) -> Any:
    """A copy made of what JSON knows alone; ``longest`` characters of it at most."""
    if (chars := extent(value, longest)[1]) > longest:  # before all of it is written
        raise invalid(name, value, f"it has {chars} characters as JSON or more, at most {longest} are allowed")
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise invalid(name, value, f"it cannot be written as JSON: {error}") from None
    if len(text) > longest:
        raise invalid(name, value, f"it has {len(text)} characters as JSON, at most {longest} are allowed")
    return json.loads(text)
