"""JSON values as texts that a grammar may accept: the order of an object's names is free in JSON, fixed in grammars."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llguidance import LLMatcher

MAX_STEPS = 2_000
"""Attempts to write some part of a value."""


class _Enough(Exception):
    """Too many orders were tried."""


def written(matcher: LLMatcher, value: Any, names: Sequence[str]) -> Iterator[LLMatcher]:
    """Matchers that have read the value, each in another order of names: first that of ``names``, all others at
    the end, as far as the grammar follows it.
    """
    try:
        yield from _Writer({name: place for place, name in enumerate(names)}).value(matcher, value)
    except (_Enough, RecursionError):
        return


class _Writer:
    """Writes a value part by part and goes back where the grammar does not follow."""

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
        """A name is good if, after its member, all others that could have come in its place still can; one that it
        shuts out has to come before it and is tried next. Names that shut others out anyway come last: a grammar may
        have alternatives of which another is still open."""
        if not left:
            yield from self._read(matcher, "}")
            return
        possible = [name for name in left if _reads(matcher, _head(name, len(left) < len(value)))]
        doubtful: list[tuple[int, int, LLMatcher, list[str]]] = []
        others: list[tuple[Iterator[LLMatcher], list[str]]] = []
        untried = possible.copy()
        while untried:
            name = untried.pop(0)
            rest = [other for other in left if other != name]
            ways = self._member(matcher, name, value, comma=len(left) < len(value))
            if (done := next(ways, None)) is None:
                continue
            others.append((ways, rest))
            if lost := [other for other in possible if other != name and not _reads(done, _head(other, True))]:
                doubtful.append((len(lost), len(doubtful), done, rest))
                untried.sort(key=lambda other: other not in lost)
            else:
                yield from self._members(done, value, rest)
        for _, _, done, rest in sorted(doubtful, key=lambda entry: entry[:2]):
            yield from self._members(done, value, rest)
        for ways, rest in others:
            for done in ways:
                yield from self._members(done, value, rest)

    def _member(self, matcher: LLMatcher, name: str, value: dict[str, Any], *, comma: bool) -> Iterator[LLMatcher]:
        for named in self._read(matcher, _head(name, comma)):
            yield from self.value(named, value[name])

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
        if after.consume_tokens(_bytes(text)):
            yield after


def _head(name: str, comma: bool) -> str:
    return f"{', ' if comma else ''}{json.dumps(name, ensure_ascii=False)}: "


def _bytes(text: str) -> list[int]:
    return list(text.encode(errors="replace"))


def _reads(matcher: LLMatcher, text: str) -> bool:
    wanted = _bytes(text)
    return matcher.validate_tokens(wanted) == len(wanted)
