"""Whether a JSON text is an instance of a schema, in bounded time: the last word where a grammar says less.

The ``jsonschema`` library does it, with three changes. A step counter ends what would take exponential time.
Patterns are matched by the grammar engine, in linear time and with the meaning they have in the grammar. References
to other documents are never fetched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError
from jsonschema.validators import extend, validator_for
from jsonschema_specifications import REGISTRY
from llguidance import LLMatcher, LLTokenizer
from referencing.exceptions import Unresolvable

from penstock.grammar.patterns import lookaheads
from penstock.grammar.schema import known_format, rewrite
from penstock.grammar.tokens import LIMITS, TokenTable

MAX_STEPS = 50_000
"""Keywords that one validation may look at: about a tenth of a second."""

MAX_MIXED = 64
"""Entries of a list of names that may be something else."""

Keyword = Callable[..., Iterator[ValidationError] | None]


class _TooLong(Exception):
    """The step counter ran out."""


class InstanceCheck:
    """Says whether texts are instances of a schema. Formats are asserted where the grammar engine knows them, as in
    grammars.

    Args:
        schema: parsed; the dialect is that of its ``$schema``, 2020-12 without one.

    Raises:
        ValueError: the schema is not one of its dialect, or a pattern is not supported; the message names the place.
    """

    def __init__(self, schema: Any) -> None:
        dialect = validator_for(schema, default=Draft202012Validator)
        try:
            dialect.check_schema(rewrite(schema, _sortable))
        except (SchemaError, RecursionError) as error:
            raise ValueError(str(getattr(error, "message", error))[:200]) from None
        self._steps = 0
        counted = extend(dialect, {name: self._counted(name, rule) for name, rule in dialect.VALIDATORS.items()})
        # Without $schema, or the library would go back to the dialect's own keywords at a reference.
        self._validator: Any = counted(rewrite(schema, _prepared), registry=REGISTRY)

    def accepts(self, text: bytes) -> bool:
        """False also where the answer would take too long, or needs a document that is not here."""
        try:
            value = json.loads(text, object_pairs_hook=_unique_names)
            self._steps = 0
            return bool(self._validator.is_valid(value))
        except (ValueError, RecursionError, Unresolvable, _TooLong):
            return False

    def _counted(self, name: str, rule: Keyword) -> Keyword:
        rule = _LINEAR.get(name, rule)

        def step(*arguments: Any) -> Iterator[ValidationError] | None:
            self._steps += 1
            if self._steps > MAX_STEPS:
                raise _TooLong
            return rule(*arguments)

        return step


def _sortable(schema: dict[str, Any], root: bool) -> dict[str, Any]:
    """For metaschemas that want entries to differ, which the library finds out in quadratic time if it cannot sort."""
    if isinstance(values := schema.get("enum"), list):
        schema["enum"] = [json.dumps(value, sort_keys=True) for value in values]
    named = [schema[name] for name in ("dependencies", "dependentRequired") if isinstance(schema.get(name), Mapping)]
    for names in (schema.get("required"), schema.get("type"), *(names for each in named for names in each.values())):
        if isinstance(names, list) and len(names) > MAX_MIXED and not all(isinstance(name, str) for name in names):
            raise ValueError(f"a list of {len(names)} names or types has entries that are not strings")
    return schema


def _prepared(schema: dict[str, Any], root: bool) -> dict[str, Any]:
    schema.pop("$schema", None)
    for pattern in (schema.get("pattern"), *(schema.get("patternProperties") or ())):
        if isinstance(pattern, str):
            _found(pattern, "")
    if "unevaluatedProperties" in schema and "patternProperties" in schema:
        raise ValueError("unevaluatedProperties beside patternProperties")
    return schema


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name occurs twice in an object")
    return names


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not _found(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(
    validator: Any, patterns: Mapping[str, Any], instance: Any, schema: Any
) -> Iterator[ValidationError]:
    if isinstance(instance, dict):
        for pattern, subschema in patterns.items():
            for name, value in instance.items():
                if _found(pattern, name):
                    yield from validator.descend(value, subschema, path=name, schema_path=pattern)


def _additional_properties(validator: Any, rest: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, dict):
        for name, value in instance.items():
            patterns = schema.get("patternProperties", {})
            if name not in schema.get("properties", {}) and not any(_found(pattern, name) for pattern in patterns):
                yield from validator.descend(value, rest, path=name)


def _format(validator: Any, name: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if (
        isinstance(instance, str)
        and isinstance(name, str)
        and known_format(name)
        and not _fits("format", name, instance)
    ):
        yield ValidationError(f"{instance!r} is no {name}")


_LINEAR: dict[str, Keyword] = {
    "format": _format,
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
}


def _found(pattern: str, text: str) -> bool:
    """Whether a pattern occurs in a text, as the ``pattern`` of a JSON schema.

    Raises:
        ValueError: the grammar engine does not support the pattern.
    """
    needed, forbidden, rest = lookaheads(pattern)
    wanted = all(_fits("pattern", part, text) for part in (*needed, rest))
    return wanted and not any(_fits("pattern", part, text) for part in forbidden)


def _fits(keyword: str, value: str, text: str) -> bool:
    matcher = _matcher(keyword, value).deep_copy()
    return (
        matcher.consume_tokens(list(json.dumps(text, ensure_ascii=False).encode(errors="replace")))
        and matcher.is_accepting()
    )


@lru_cache(maxsize=256)
def _matcher(keyword: str, value: str) -> LLMatcher:
    matcher = LLMatcher(
        _bytes(), LLMatcher.grammar_from_json_schema({"type": "string", keyword: value}), log_level=0, limits=LIMITS
    )
    if matcher.is_error():
        raise ValueError(f"{keyword} {value[:60]!r}: {matcher.get_error()[:200]}")
    return matcher


@lru_cache(maxsize=1)
def _bytes() -> LLTokenizer:
    return TokenTable.bytes_only().backend
