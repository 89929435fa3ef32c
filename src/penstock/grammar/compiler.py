"""From StructuredOutputs to a Grammar: compiled once, bounded in time and memory, refused in words."""

from __future__ import annotations

import json
import re
import reprlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakValueDictionary

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from penstock.base import InvalidRequest
from penstock.grammar.grammar import BYTES, STEPS, Grammar
from penstock.grammar.matcher import Matcher
from penstock.grammar.patterns import is_cut
from penstock.grammar.references import depth, infinite_part
from penstock.grammar.refusals import MAX_DEPTH, brief, refusal, too_large, vet_levels
from penstock.grammar.schema import (
    hints,
    is_old_dialect,
    patterns,
    property_counts,
    property_names,
    readings,
    references,
)
from penstock.grammar.tags import tags_grammar
from penstock.grammar.texts import unanchored
from penstock.grammar.tokens import TokenTable
from penstock.grammar.validation import InstanceCheck
from penstock.spec import StructuredOutputs

CACHED = 64
"""Grammars kept although no request is using them, the most recently used ones."""

MAX_PATTERNS = 40
"""Patterns of a schema for which a match is looked for."""

MAX_GBNF = 100_000
"""Characters of a grammar in GBNF, whose reading takes some 8 us each."""

MAX_PROPERTY_PAIRS = 4_000_000
"""Sum of the squares of the objects' properties: one of 2000, or a hundred of 200. About 3 s."""


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
            InvalidRequest: unsupported_schema, invalid_regex, invalid_grammar, grammar_too_large, infinite_schema,
                no_end_token; the message says where and why.
        """
        with self._lock:
            if (known := self._known.get(wanted)) is not None:
                return self._use(wanted, known)
            self._table = self._table or self._make_table()
        grammar = _compile(wanted, self._table)
        with self._lock:
            self._known[wanted] = grammar
            return self._use(wanted, grammar)

    def known(self, wanted: StructuredOutputs) -> Grammar | None:
        """What ``compile`` would have at once. Waits for nobody."""
        return self._known.get(wanted)

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
    if not table.end_ids:
        raise InvalidRequest(
            "no_end_token",
            "This model cannot write structured outputs",
            why="it has no end token, so that it could not say that a text is complete",
            fix="name its eos_token_id in generation_config.json",
        )
    match wanted.kind:
        case "json":
            return _from_schema(json.loads(str(wanted.json)), table, compact=wanted.disable_any_whitespace)
        case "json_object":
            return _from_schema({"type": "object"}, table, compact=wanted.disable_any_whitespace)
        case "structural_tag":
            return _from_tags(json.loads(str(wanted.structural_tag)), table)
    source, code, what = _source(wanted)
    try:
        return Grammar(source, table)
    except ValueError as error:
        raise refusal(code, f"The {what} cannot be compiled", error, fix="correct or simplify what is named") from None


def _source(wanted: StructuredOutputs) -> tuple[str, str, str]:
    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(unanchored(wanted.regex)), "invalid_regex", "regular expression"
    if wanted.choice is not None:  # one expression: as alternatives of a grammar they would be searched one by one
        options = "|".join(_literal(text) for text in wanted.choice)
        return LLMatcher.grammar_from_regex(options), "invalid_grammar", "choice"
    assert wanted.grammar is not None
    text = wanted.grammar
    if "::=" in text:
        if len(text) > MAX_GBNF:
            raise too_large("The GBNF grammar", f"it has {len(text)} characters, at most {MAX_GBNF} are allowed")
        try:
            text = gbnf_to_lark(text)
        except Exception as error:
            fix = "correct it there; rules are written NAME ::= ..., as llama.cpp has them"
            raise InvalidRequest(
                "invalid_grammar", "The GBNF grammar cannot be read", why=brief(error), fix=fix
            ) from None
    _vet_grammar(text)
    return LLMatcher.grammar_from_lark(text), "invalid_grammar", "grammar"


def _vet_grammar(text: str) -> None:
    """Refuses a grammar in Lark that may be too deep, by itself or in a schema that it holds."""
    vet_levels(text)
    for inner in re.finditer(r"%json\s*", text):
        try:
            _vet(json.JSONDecoder().raw_decode(text, inner.end())[0])
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(
                "invalid_grammar", "What follows %json is not JSON", why=brief(error), fix="write a JSON schema there"
            ) from None


def _literal(text: str) -> str:
    """The regular expression of a string."""
    return "".join(char if char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


def _from_schema(schema: Any, table: TokenTable, *, compact: bool) -> Grammar:
    _vet(schema)
    errors: list[ValueError] = []
    names = property_names(schema)
    values = (*_pattern_words(schema), *hints(schema))
    check = None
    for source, exact in readings(schema, compact=compact):
        try:
            check = None if exact else check or InstanceCheck(schema)
            grammar = Grammar(source, table, check, is_json=True, hints=values, names=names)
        except ValueError as error:
            errors.append(error)
            continue
        if exact or grammar.closing is not None:
            return grammar
        errors.append(ValueError(f"no instance of it was found ({brief(errors[0])})"))
        break
    raise refusal(
        "unsupported_schema",
        "This JSON schema cannot be compiled",
        errors[-1],
        fix="simplify the named part, or check that any JSON can satisfy it",
    )


def _from_tags(tags: Any, table: TokenTable) -> Grammar:
    schemas = [structure["schema"] for structure in tags["structures"] if "schema" in structure]
    for schema in [*schemas, tags.get("answer", True)]:
        _vet(schema)
    values = tuple(value for schema in schemas for value in hints(schema))
    try:
        return Grammar(tags_grammar(tags, table), table, is_json=bool(tags.get("at_least")), hints=values)
    except ValueError as error:
        fix = "simplify the named part of the schema; the form in which it must hold knows less than a schema alone"
        what = (
            "A schema of these tools cannot be compiled"
            if tags["structures"]
            else "This JSON schema cannot be compiled"
        )
        raise refusal("unsupported_schema", what, error, fix=fix) from None


def _vet(schema: Any) -> None:
    """Refuses what would cost too much, could never end, or would be misread."""
    if (pairs := sum(size * size for size in property_counts(schema))) > MAX_PROPERTY_PAIRS:
        why = f"its cost grows with the square of an object's properties: {pairs:,}, at most {MAX_PROPERTY_PAIRS:,}"
        raise too_large("The JSON schema", why)
    if (levels := depth(schema, references(schema))) > MAX_DEPTH:
        why = f"with its references followed it may be {levels:,} levels deep, at most {MAX_DEPTH:,} are allowed"
        raise too_large("The JSON schema", why)
    for pattern in patterns(schema):
        if is_cut(pattern):
            why = f"the pattern {reprlib.repr(pattern)} ends in a backslash that escapes nothing"
            raise InvalidRequest(
                "unsupported_schema", "This JSON schema cannot be compiled", why=why, fix="escape it with another"
            )
    if (part := infinite_part(schema, bare_refs=is_old_dialect(schema))) is not None:
        raise InvalidRequest(
            "infinite_schema",
            "No finite JSON satisfies this schema",
            why=f"what {reprlib.repr(part)} refers to requires itself again",
            fix="make it optional somewhere, or allow null",
        )


def _pattern_words(schema: Any) -> Iterator[bytes]:
    """For each pattern a text that is nothing but a match of it, which chance would not find."""
    for pattern in patterns(schema)[:MAX_PATTERNS]:
        anchored = {"type": "string", "pattern": f"^(?:{pattern})$"}
        try:
            word = Grammar(next(readings(anchored, compact=True)).grammar, BYTES, is_json=True, steps=STEPS).closing
        except ValueError:
            continue
        if word is not None:
            yield word
