"""From StructuredOutputs to a Grammar: compiled once, bounded in time and memory, refused in words."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakValueDictionary

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from penstock.base import InvalidRequest
from penstock.grammar.grammar import BYTES, Grammar
from penstock.grammar.matcher import Matcher
from penstock.grammar.schema import hints, patterns, property_names, readings
from penstock.grammar.tokens import TokenTable
from penstock.grammar.validation import InstanceCheck
from penstock.spec import StructuredOutputs

CACHED = 64
"""Grammars kept although no request is using them, the most recently used ones."""

MAX_PATTERNS = 40
"""Patterns of a schema for which a match is looked for."""


class Grammars:
    """Compiles grammars for one vocabulary and remembers them. Safe to use from several threads.

    Args:
        table: makes the token table, which is done at first use.
    """

    def __init__(self, table: Callable[[], TokenTable]) -> None:
        self._make_table = table
        self._table: TokenTable | None = None
        self._known: WeakValueDictionary[StructuredOutputs, Grammar] = WeakValueDictionary()
        self._recent: OrderedDict[StructuredOutputs, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, wanted: StructuredOutputs) -> Grammar:
        """The grammar of a request. It is not compiled again as long as somebody holds it.

        Raises:
            InvalidRequest: unsupported_schema, invalid_regex, invalid_grammar; the message says where and why.
        """
        with self._lock:
            if (known := self._known.get(wanted)) is not None:
                return self._use(wanted, known)
            self._table = self._table or self._make_table()
        grammar = _compile(wanted, self._table)
        with self._lock:
            self._known[wanted] = grammar
            return self._use(wanted, grammar)

    def _use(self, wanted: StructuredOutputs, grammar: Grammar) -> Grammar:
        self._recent[wanted] = grammar
        self._recent.move_to_end(wanted)
        if len(self._recent) > CACHED:
            self._recent.popitem(last=False)
        return grammar

    def matcher(self, wanted: StructuredOutputs, room: int, end_ids: tuple[int, ...]) -> Matcher:
        """At the start of a completion; arguments as of ``Matcher``. Raises as ``compile``."""
        return Matcher(self.compile(wanted), room, end_ids)


def _compile(wanted: StructuredOutputs, table: TokenTable) -> Grammar:
    match wanted.kind:
        case "json":
            return _from_schema(json.loads(str(wanted.json)), table, compact=wanted.disable_any_whitespace)
        case "json_object":
            return _from_schema({"type": "object"}, table, compact=wanted.disable_any_whitespace)
    source, code, what = _source(wanted)
    try:
        return Grammar(source, table)
    except ValueError as error:
        raise InvalidRequest(code, f"The {what} cannot be compiled", why=_brief(error)) from None


def _source(wanted: StructuredOutputs) -> tuple[str, str, str]:
    if wanted.regex is not None:
        regex = wanted.regex.removeprefix("^")
        if regex.endswith("$") and not regex.endswith("\\$"):
            regex = regex[:-1]
        return LLMatcher.grammar_from_regex(regex), "invalid_regex", "regular expression"
    if wanted.choice is not None:
        options = " | ".join(json.dumps(text, ensure_ascii=False) for text in wanted.choice)
        return LLMatcher.grammar_from_lark(f"start: {options}"), "invalid_grammar", "choice"
    assert wanted.grammar is not None
    text = wanted.grammar
    if "::=" in text:
        try:
            text = gbnf_to_lark(text)
        except Exception as error:
            why = _brief(error)
            raise InvalidRequest("invalid_grammar", "The GBNF grammar cannot be read", why=why) from None
    return LLMatcher.grammar_from_lark(text), "invalid_grammar", "grammar"


def _from_schema(schema: Any, table: TokenTable, *, compact: bool) -> Grammar:
    errors: list[str] = []
    names = property_names(schema)
    values = (*_pattern_words(schema), *hints(schema))
    for source, exact in readings(schema, compact=compact):
        try:
            check = None if exact else InstanceCheck(schema)
            grammar = Grammar(source, table, check, is_json=True, hints=values, names=names)
        except ValueError as error:
            errors.append(_brief(error))
            continue
        if exact or grammar.closing is not None:
            return grammar
        errors.append(f"no instance of it was found ({errors[0]})")
        break
    raise InvalidRequest(
        "unsupported_schema",
        "This JSON schema cannot be compiled",
        why=errors[-1],
        fix="simplify the named part, or check that any JSON can satisfy it",
    )


def _pattern_words(schema: Any) -> Iterator[bytes]:
    """For each pattern a text that is nothing but a match of it, which chance would not find."""
    for pattern in patterns(schema)[:MAX_PATTERNS]:
        anchored = {"type": "string", "pattern": f"^(?:{pattern})$"}
        try:
            word = Grammar(next(readings(anchored, compact=True)).grammar, BYTES, is_json=True).closing
        except ValueError:
            continue
        if word is not None:
            yield word


def _brief(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:300]
