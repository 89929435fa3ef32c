"""JSON values as texts that a grammar may accept: the order of an object's names is free in JSON, fixed in grammars."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llguidance import LLMatcher

MAX_STEPS = 3_000
"""Attempts to write some part of a value."""


class _Enough(Exception):
    """Too many orders were tried."""


def written(matcher: LLMatcher, value: Any, names: Sequence[str]) -> Iterator[LLMatcher]:
    """Matchers that have read the value, each in another order of names: first the given order and what is near it,
    then that of ``names``, with all others at the end.
    """
    for order in ((), names):
        try:
            yield from _Writer({name: place for place, name in enumerate(order)}).value(matcher, value)
        except (_Enough, RecursionError):
            continue


class _Writer:
    def __init__(self, places: Mapping[str, int]) -> None:
        self.places, self.steps = places, 0

    def value(self, matcher: LLMatcher, value: Any) -> Iterator[LLMatcher]:
        if isinstance(value, dict) and value:
            for opened in self._read(matcher, "{"):
                yield from self._members(
                    opened, value, sorted(value, key=lambda name: self.places.get(name, len(self.places)))
                )
        elif isinstance(value, list) and value:
            for opened in self._read(matcher, "["):
                yield from self._items(opened, value, 0)
        else:
            yield from self._read(matcher, json.dumps(value, ensure_ascii=False))

    def _members(self, matcher: LLMatcher, value: dict[str, Any], left: list[str]) -> Iterator[LLMatcher]:
        if not left:
            yield from self._read(matcher, "}")
        comma = ", " if len(left) < len(value) else ""
        for name in left:
            rest = [other for other in left if other != name]
            for named in self._read(matcher, f"{comma}{json.dumps(name, ensure_ascii=False)}: "):
                for done in self.value(named, value[name]):
                    yield from self._members(done, value, rest)

    def _items(self, matcher: LLMatcher, items: list[Any], at: int) -> Iterator[LLMatcher]:
        if at == len(items):
            yield from self._read(matcher, "]")
            return
        for begun in self._read(matcher, ", " if at else ""):
            for done in self.value(begun, items[at]):
                yield from self._items(done, items, at + 1)

    def _read(self, matcher: LLMatcher, text: str) -> Iterator[LLMatcher]:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise _Enough
        after = matcher.deep_copy()
        if after.consume_tokens(list(text.encode(errors="replace"))):
            yield after
