"""Arguments written one by one as plain text, held to the schema of their object as far as such a text can be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from penstock.grammar.schema import exact

_SAID = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated"}
"""What a schema says without demanding anything."""
_OBJECT = _SAID | {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_DEFINITIONS = ("$defs", "definitions")
_LENGTHS = {"minLength", "maxLength"}
MAX_LENGTH = 100_000
ANY_FIELDS = 64
"""Arguments of a tool whose schema names none."""

Literal = Callable[[str], str]
Until = Callable[[str, str, str], str]
"""(name of the rule, mark at its end, terminal before that) -> the rule."""


class FieldWriter:
    """Writes rules of llguidance's Lark. Args: name: makes those of one structure its own.

    Attributes:
        rules: what ``fields`` needs beside what it returns.
    """

    def __init__(self, name: str, begin: str, end: str, literal: Literal, until: Until) -> None:
        self._name, self._begin, self._end, self._literal, self._until = name, begin, end, literal, until
        self.rules: list[str] = []

    def fields(self, schema: Any) -> str:
        """Raises ValueError: it demands what cannot be held in this form."""
        schema = {} if schema is True else schema
        if not isinstance(schema, Mapping) or set(schema) - _OBJECT:
            beyond = sorted(set(schema) - _OBJECT) if isinstance(schema, Mapping) else ["false"]
            raise ValueError(f"arguments that are written one by one cannot be held to {', '.join(beyond)}")
        properties, required = schema.get("properties", {}), schema.get("required", [])
        named = isinstance(required, list) and all(isinstance(name, str) for name in required)
        if not isinstance(properties, Mapping) or not named:
            raise ValueError("properties must be an object, and required a list of names")
        if missing := [name for name in required if name not in properties or properties[name] is False]:
            raise ValueError(f"{missing[0]!r} is required, but not among the properties")
        if not properties and schema.get("additionalProperties") is not False:
            return self._any()
        parts = []
        for i, (key, part) in enumerate(properties.items()):
            definitions = {name: schema[name] for name in _DEFINITIONS if isinstance(schema.get(name), Mapping)}
            if part is False:
                continue
            field = self._field(i, key, part, definitions)
            parts.append(field if key in required else f"({field})?")
        return " ".join(parts)

    def _any(self) -> str:
        name = f"field_{self._name}"
        before, after = self._begin.split("{key}")
        self.rules.append(self._until(f"{name}_key", after, "KEY"))
        self.rules.append(self._until(f"{name}_text", self._end, "TEXT"))
        self.rules.append(f"{name}: {self._literal(before)} {name}_key {name}_text")
        return f"{name}{{0,{ANY_FIELDS}}}"

    def _field(self, number: int, key: str, part: Any, definitions: Mapping[str, Any]) -> str:
        if not key or any(char in "<>\n" for char in key):
            raise ValueError(f"the name {key[:64]!r} cannot be written in this form")
        name, begin = f"field_{self._name}_{number}", self._literal(self._begin.replace("{key}", key))
        part = _followed(part, definitions)
        kinds = _types(part)
        if kinds is not None and "string" not in kinds:
            inner = f"%json {json.dumps(exact({**part, **definitions}))} {self._literal(self._end)}"
        elif kinds == {"string"} and ("enum" in part or "const" in part):
            words = part.get("enum", [part.get("const")])
            if any(self._end in word for word in words):
                raise ValueError(f"a value of {key[:64]!r} cannot be written in this form")
            options = " | ".join(self._literal(word) or '""' for word in words)
            inner = f"({options}) {self._literal(self._end)}"
        else:
            self.rules.append(self._until(name, self._end, self._text(key, part, name)))
            inner = name
        return f"{begin} {inner}"

    def _text(self, key: str, part: Any, name: str) -> str:
        """The terminal of a value that may be any string, or one of some length."""
        demands = set(part) - _SAID - {"type"} if isinstance(part, Mapping) else set()
        if demands and demands <= _LENGTHS and _types(part) == {"string"}:
            least, most = part.get("minLength", 0), part.get("maxLength", MAX_LENGTH)
            if not all(type(number) is int and 0 <= number <= MAX_LENGTH for number in (least, most)) or least > most:
                raise ValueError(f"the length of {key[:64]!r} must be within 0 and {MAX_LENGTH}")
            self.rules.append(f"{name.upper()}: /(.|\\n){{{least},{most}}}/ & {without(self._end)}")
            return name.upper()
        if demands and not _is_free(part):
            beyond = ", ".join(sorted(demands - _LENGTHS or demands))
            raise ValueError(f"a text such as {key[:64]!r} cannot be held to {beyond} in this form")
        return "TEXT"


def without(end: str) -> str:
    """The terminal of all texts that a mark is not in."""
    mark = "".join(char if char.isalnum() else f"\\x{{{ord(char):x}}}" for char in end)
    return f"~/(.|\\n)*{mark}(.|\\n)*/"


def _is_free(part: Any) -> bool:
    """Any text is an instance: a choice of bare types of which one is a string."""
    options = part.get("anyOf") or part.get("oneOf")
    if not isinstance(options, list) or set(part) - _SAID - {"anyOf", "oneOf"}:
        return False
    bare = all(isinstance(option, Mapping) and not set(option) - _SAID - {"type"} for option in options)
    return bare and any("string" in (_types(option) or ()) for option in options)


def _followed(part: Any, definitions: Mapping[str, Any]) -> Any:
    """What a reference leads to that says nothing else."""
    while isinstance(part, Mapping) and "$ref" in part and not set(part) - _SAID - {"$ref"}:
        place, _, name = str(part["$ref"]).removeprefix("#/").partition("/")
        if name not in (among := definitions.get(place, {})):
            break
        definitions, part = {place: {key: among[key] for key in among if key != name}}, among[name]
    return part


def _types(part: Any) -> set[str] | None:
    """Of what the schema says at its top; None if it leaves them open, or some are strings and have bounds.

    Raises ValueError: it is no schema.
    """
    if not isinstance(part, Mapping):
        return None
    if "enum" in part or "const" in part:
        values = part.get("enum", [part.get("const")])
        strings = {isinstance(value, str) for value in values} if isinstance(values, list) else set()
        if not strings:
            raise ValueError("enum must be a list of values")
        return ({"string"} if strings.pop() else {"constant"}) if len(strings) == 1 else None
    types = part.get("type")
    named = types if isinstance(types, list) else [types]
    if not all(isinstance(kind, str) for kind in named):
        if types is None:
            return None
        raise ValueError("type must be a text, or a list of texts")
    return set(named)
