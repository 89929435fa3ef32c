"""JSON schemas as grammars: what the grammar engine reads as it is, and what has to be said another way.

llguidance compiles a large part of JSON Schema exactly. What it refuses is rewritten, in this order:

| keyword | rewriting | language |
| --- | --- | --- |
| ``format`` it does not know | dropped: formats are annotations | same |
| ``exclusiveMinimum``/``Maximum``: true (draft 4) | a number | same |
| ``maxItems`` and the like: 2.0 | 2 | same |
| ``$ref`` with siblings, drafts up to 7 | siblings dropped, as the drafts say | same |
| ``$schema`` below the root | dropped: one dialect for the whole | same |
| ``pattern`` that begins with ``(?=...)`` | ``allOf`` of patterns | same |
| ``pattern`` that begins with ``(?!...)`` | that part is left to validation | wider |
| ``oneOf`` with branches that may overlap | ``anyOf`` | wider |
| ``not``, ``if``/``then``/``else``, ``uniqueItems``, ``contains``, ``propertyNames`` | left to validation | wider |
| ``dependencies``, ``dependentRequired``, ``dependentSchemas`` | left to validation | wider |
| ``unevaluatedProperties``, ``unevaluatedItems`` | left to validation | wider |
| ``minProperties``, ``maxProperties`` that llguidance cannot count | left to validation | wider |
| ``patternProperties`` that overlap | left to validation, with ``additionalProperties`` | wider |
| ``$ref`` to itself with siblings | siblings left to validation | wider |

Where the language became wider, a completion must also pass ``InstanceCheck`` of the schema as it was given before it
may end, and a token is drawn only if a valid end can still be shown (``Matcher.admits``). What none of this covers is
refused with llguidance's own description of the place, and so is a schema for which no instance is found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from llguidance import LLMatcher

from penstock.grammar.patterns import lookaheads

Schema = Any
"""Parsed JSON: a mapping or a boolean where the schema is sound."""

WHITESPACE = r" |\r?\n[ \t]{0,40}"
"""Between the parts of JSON: a space, or a new line and its indentation. Models lose themselves in more."""

_NAMED = ("$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties")
_DATA = ("const", "default", "enum", "examples", "required", "type")
_COUNTS = ("maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties")

MAX_HINTS, MAX_HINT = 500, 60
"""How many hints are taken from a schema, and how long they may be."""


class Reading(NamedTuple):
    """A schema as a grammar.

    Attributes:
        grammar: in llguidance's form.
        exact: the grammar's language is that of the schema; otherwise it is wider.
    """

    grammar: str
    exact: bool


def readings(schema: Schema, *, compact: bool) -> Iterator[Reading]:
    """Grammars of a schema, the most exact first; take the first one that compiles."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    plain = rewrite(schema, _Same(old_refs=is_old_dialect(schema)).rewrite)
    yield Reading(_grammar(plain, compact, wider=False), exact=True)
    for wider in (_uncounted, _wider_patterns, _without_overlaps, _bare_refs):
        plain = rewrite(plain, wider)
        yield Reading(_grammar(plain, compact, wider=True), exact=False)


def exact(schema: Schema) -> Schema:
    """A schema to be read in another grammar, as its first reading is."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    plain = rewrite(schema, _Same(old_refs=is_old_dialect(schema)).rewrite)
    return plain | {"x-guidance": {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE}}


def hints(schema: Schema) -> tuple[bytes, ...]:
    """JSON values that the schema speaks of, as texts: its names, constants, bounds and words of its patterns."""
    found: dict[bytes, None] = {}
    left = [schema]
    while left and len(found) < MAX_HINTS:
        part = left.pop()
        if isinstance(part, Mapping):
            left += part.values()
            left += part
        elif isinstance(part, list):
            left += part
        if isinstance(part, str):
            words = [part, *re.findall(r"\w+", part)] if len(part) <= MAX_HINT else []
            found |= dict.fromkeys(json.dumps(word, ensure_ascii=False).encode(errors="replace") for word in words)
        elif isinstance(part, (int, float)) and not isinstance(part, bool):
            found |= dict.fromkeys(json.dumps(number).encode() for number in (part, part + 1, part - 1))
        elif isinstance(part, list) and len(text := json.dumps(part)) <= MAX_HINT:
            found[text.encode()] = None
    return tuple(found)


def patterns(schema: Schema) -> list[str]:
    """All regular expressions in a schema."""
    parts = _parts(schema)
    single = [part["pattern"] for part in parts if isinstance(part.get("pattern"), str)]
    return list(dict.fromkeys([*single, *(name for part in parts for name in _names(part, "patternProperties"))]))


def references(schema: Schema) -> set[str]:
    """All targets of ``$ref``."""
    return {part["$ref"] for part in _parts(schema) if isinstance(part.get("$ref"), str)}


def property_names(schema: Schema) -> list[str]:
    """All names of properties, in the order of the schema."""
    return list(dict.fromkeys(name for part in _parts(schema) for name in _names(part, "properties")))


def property_counts(schema: Schema) -> list[int]:
    """How many properties each object of a schema lists."""
    return [len(list(_names(part, "properties"))) for part in _parts(schema)]


def _parts(schema: Schema) -> list[dict[str, Any]]:
    """Every schema in a schema."""
    parts: list[dict[str, Any]] = []

    def collect(part: dict[str, Any], root: bool) -> dict[str, Any]:
        parts.append(part)
        return part

    rewrite(schema, collect)
    return parts


def _names(schema: Mapping[str, Any], keyword: str) -> Iterator[str]:
    named = schema.get(keyword)
    return iter(named if isinstance(named, Mapping) else ())


def _grammar(schema: Schema, compact: bool, *, wider: bool) -> str:
    options: dict[str, Any] = {"coerce_one_of": wider, "lenient": wider, "whitespace_flexible": not compact}
    if not compact:
        options["whitespace_pattern"] = WHITESPACE
    text: str = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)  # type: ignore[arg-type]
    return text


def rewrite(schema: Schema, change: Callable[[dict[str, Any], bool], dict[str, Any]], root: bool = True) -> Schema:
    """Applies ``change`` to every schema object, the inner ones first."""
    if isinstance(schema, list):
        return [rewrite(entry, change, False) for entry in schema]
    if not isinstance(schema, Mapping):
        return schema
    changed: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _DATA:
            changed[name] = value
        elif name in _NAMED and isinstance(value, Mapping):
            changed[name] = {key: rewrite(entry, change, False) for key, entry in value.items()}
        elif isinstance(value, (list, Mapping)):
            changed[name] = rewrite(value, change, False)  # an unknown keyword may hold what a $ref points to
        else:
            changed[name] = value
    return change(changed, root)


class _Same:
    """Rewritings that keep the language."""

    def __init__(self, *, old_refs: bool) -> None:
        self.old_refs = old_refs

    def rewrite(self, schema: dict[str, Any], root: bool) -> dict[str, Any]:
        if not root and isinstance(schema.get("$schema"), str):
            del schema["$schema"]
        form = schema.get("format")
        if isinstance(form, str) and not known_format(form):
            del schema["format"]
        for name in ("minimum", "maximum"):
            _exclusive_number(schema, name)
        for name in _COUNTS:
            if isinstance(value := schema.get(name), float) and value.is_integer():
                schema[name] = int(value)
        if self.old_refs:
            schema = _bare_refs(schema, root)
        pattern = schema.get("pattern")
        if isinstance(pattern, str):
            needed, forbidden, rest = lookaheads(pattern)
            if needed and not forbidden:
                schema["pattern"] = rest
                schema["allOf"] = [*schema.get("allOf", []), *({"pattern": part} for part in needed)]
        return schema


def _exclusive_number(schema: dict[str, Any], name: str) -> None:
    exclusive = "exclusive" + name.capitalize()
    if isinstance(schema.get(exclusive), bool) and schema.pop(exclusive) and name in schema:
        schema[exclusive] = schema.pop(name)


def _uncounted(schema: dict[str, Any], root: bool) -> dict[str, Any]:
    """llguidance cannot count properties if some of those listed may be missing; told to go on, it miscounts."""
    listed, required = schema.get("properties"), schema.get("required")
    if isinstance(listed, Mapping) and not set(listed).issubset(required if isinstance(required, list) else ()):
        schema.pop("minProperties", None)
        schema.pop("maxProperties", None)
    return schema


def _wider_patterns(schema: dict[str, Any], root: bool) -> dict[str, Any]:
    if isinstance(schema.get("pattern"), str):
        needed, forbidden, rest = lookaheads(schema["pattern"])
        if needed or forbidden:
            schema["pattern"] = rest
            schema["allOf"] = [*schema.get("allOf", []), *({"pattern": part} for part in needed)]
    return schema


def _without_overlaps(schema: dict[str, Any], root: bool) -> dict[str, Any]:
    if isinstance(schema.get("patternProperties"), Mapping):
        schema.pop("patternProperties")
        schema.pop("additionalProperties", None)
    return schema


def _bare_refs(schema: dict[str, Any], root: bool) -> dict[str, Any]:
    if root or not isinstance(schema.get("$ref"), str):
        return schema
    return {name: value for name, value in schema.items() if name in ("$ref", "$id", "id", "$defs", "definitions")}


def is_old_dialect(schema: Schema) -> bool:
    """Draft 7 or earlier, where nothing beside a ``$ref`` counts."""
    dialect = schema.get("$schema") if isinstance(schema, Mapping) else None
    return isinstance(dialect, str) and bool(re.search(r"draft-0[3-7]", dialect))


@lru_cache(maxsize=1024)
def known_format(name: str) -> bool:
    """Whether the grammar engine has a grammar for a ``format``."""
    grammar = LLMatcher.grammar_from_json_schema({"type": "string", "format": name})
    return not LLMatcher.validate_grammar(grammar)
