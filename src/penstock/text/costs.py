"""What the operations of a template cost when their operands are large, paid before they are carried out."""

from __future__ import annotations

import re
import string
from collections.abc import ItemsView, Iterable, KeysView, Sequence, ValuesView
from typing import Any

from jinja2.exceptions import TemplateRuntimeError
from jinja2.runtime import Undefined

from penstock.text.metering import Budget, BudgetExceeded

MAX_DEPTH = 100
"""Nesting of a value that is printed or compared."""
MAX_WIDTH = 1_000
"""Widths, precisions and counts given to filters and string methods."""
MAX_BITS = 1_024
"""Size of an integer made by ``*`` or ``**``."""

_PRINTABLE = (int, float, type(None), Undefined, range)
_WIDTHS = frozenset("batch center expandtabs indent ljust rjust round slice tojson zfill".split())
_WIDE = re.compile(r"%(\([^()]*\))?+[-+ #0]*+(\d{4}|\*|\d*\.(\d{4}|\*)|\()")


def extent(budget: Budget, value: Any, *, loose: bool = False) -> int:
    """About how many characters a value has when printed, having paid for walking through it.

    A list may hold another many times over, so its extent can be far beyond what it takes in memory.

    Raises:
        BudgetExceeded: the budget does not reach, or it is nested more than MAX_DEPTH deep.
        TemplateRuntimeError: it has no text, as a macro or a namespace (unless ``loose``).
    """
    total, stack = 0, [(value, 0)]
    while stack:
        item, depth = stack.pop()
        size = 8
        parts: Sequence[Any] = ()
        if isinstance(item, str):
            size = len(item)
        elif isinstance(item, (list, tuple)):
            parts = item
        elif isinstance(item, dict):
            parts = (*item.keys(), *item.values())
        elif isinstance(item, (KeysView, ValuesView, ItemsView)):
            parts = tuple(item)
        elif not loose and not isinstance(item, _PRINTABLE):
            raise TemplateRuntimeError(f"a {type(item).__name__} has no text")
        if depth > MAX_DEPTH:
            raise BudgetExceeded(f"a value is nested more than {MAX_DEPTH} deep")
        budget.spend(2 + 5 * len(parts), size)
        total += size + 4 * len(parts)
        stack += [(part, depth + 1) for part in parts]
    return total


def prepay_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    match operator, left, right:
        case "%", str(), _:
            _prepay_percent(budget, left, [right])
        case "*", str() | list() | tuple(), int():
            budget.spend(0, extent(budget, left, loose=True) * max(right, 0))
        case "*", int(), str() | list() | tuple():
            budget.spend(0, extent(budget, right, loose=True) * max(left, 0))
        case ("*", int(), int()) if left.bit_length() + right.bit_length() > MAX_BITS:
            raise BudgetExceeded("it makes too large a number")
        case ("**", int(), int()) if left.bit_length() * right > MAX_BITS:
            raise BudgetExceeded("it makes too large a number")
        case "+", str(), str():
            budget.spend(0, len(left) + len(right))
        case "+", list(), list():
            budget.spend(0, 8 * (len(left) + len(right)))
        case "+", tuple(), tuple():  # see Metering.visit_Tuple
            extent(budget, left, loose=True)
            extent(budget, right, loose=True)


def prepay_method(budget: Budget, owner: Any, name: str, *args: Any, **kwargs: Any) -> None:
    """For a method of a text, a container or a loop."""
    for value in args:
        extent(budget, value, loose=True)
    if isinstance(owner, str):
        budget.spend(0, len(owner))
        prepay(budget, name, owner, *args, **kwargs)
    elif name in ("count", "index"):
        extent(budget, owner, loose=True)


def prepay_format(budget: Budget, template: str, values: Iterable[Any]) -> None:
    """For ``str.format``. A field may name any part of an argument, so each may cost what all arguments do."""
    budget.spend(0, 4 * len(template))
    fields = [(spec, field) for _, field, spec, _ in string.Formatter().parse(template) if field is not None]
    if any("{" in (spec or "") or re.search(r"\d{4}", spec or "") for spec, _ in fields):
        raise BudgetExceeded("a format asks for a great or a computed width")
    size = sum(extent(budget, value) for value in values)
    budget.spend(0, len(fields) * (size + MAX_WIDTH))


def prepay(budget: Budget, name: str, subject: Any, *args: Any, **kwargs: Any) -> None:
    """For a filter, or a method of a text, that can make much out of little."""
    given = (*args, *kwargs.values())
    if name in _WIDTHS:
        for value in given:
            if (isinstance(value, int) and abs(value) > MAX_WIDTH) or (isinstance(value, str) and len(value) > 64):
                raise BudgetExceeded(f"{name} is asked for more than {MAX_WIDTH}")
    match name:
        case "format":
            _prepay_percent(budget, str(subject), given)
        case "replace":
            _prepay_replace(budget, str(subject), *args, **kwargs)
        case "join":  # a method of what is put between, or a filter of the items: the product is the same
            other = kwargs.get("d", args[0] if args else "")
            if hasattr(subject, "__len__") and hasattr(other, "__len__"):
                budget.spend(0, len(subject) * len(other))
        case "indent":
            width = next((v for v in given if isinstance(v, (int, str)) and not isinstance(v, bool)), 4)
            lines = len(str(subject).splitlines()) + 1
            budget.spend(0, lines * (len(width) if isinstance(width, str) else width))
        case "strip" | "lstrip" | "rstrip" | "trim":  # looks for every character of one text in the other
            if any(isinstance(value, str) and len(value) > 256 for value in given):
                raise BudgetExceeded(f"{name} is given too many characters")
        case "split" | "rsplit":
            between = kwargs.get("sep", args[0] if args else None)
            pieces = subject.count(between) if isinstance(between, str) and between else len(subject) // 2
            budget.spend(0, 16 * pieces)
        case "splitlines" | "title" | "wordcount":  # the last two split, too
            budget.spend(0, 8 * len(str(subject)))
        case "dictsort" | "groupby" | "max" | "min" | "sort" | "unique":
            budget.spend(4 * len(subject) if hasattr(subject, "__len__") else 0)
        case "tojson":
            budget.spend(0, extent(budget, subject) * (1 + sum(map(_json_padding, given))))
        case "sum":
            start = kwargs.get("start", args[1] if len(args) > 1 else 0)
            if not isinstance(start, (int, float)):
                raise TemplateRuntimeError("sum adds numbers only")


def _prepay_percent(budget: Budget, template: str, values: Sequence[Any]) -> None:
    budget.spend(0, len(template))
    if _WIDE.search(template):
        raise BudgetExceeded("a format asks for a great or a computed width")
    size = sum(extent(budget, value) for value in values)
    budget.spend(0, template.count("%") * (size + MAX_WIDTH))


def _prepay_replace(budget: Budget, text: str, old: object = "", new: object = "", count: int | None = None) -> None:
    places = text.count(str(old)) if str(old) else len(text) + 1
    budget.spend(0, len(text) + places * len(str(new)))


def _json_padding(argument: Any) -> int:
    """How many times its own length an argument of tojson may add to each value."""
    if isinstance(argument, bool):
        return 12  # ensure_ascii: two escapes of six characters for one
    if isinstance(argument, int):
        return max(argument, 0) * MAX_DEPTH
    if isinstance(argument, str):
        return len(argument) * MAX_DEPTH
    return sum(map(len, argument)) if isinstance(argument, (tuple, list)) else 0
