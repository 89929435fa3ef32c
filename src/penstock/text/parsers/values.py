"""Arguments that a format writes as plain text, one by one: which JSON they stand for, by the tool's schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from penstock.text.parsers.jsontext import JsonText

ALL = frozenset({"string", "number", "boolean", "null", "array", "object"})
STRING = frozenset({"string"})
MOST_REFERENCES = 64
"""That are followed for one argument."""
_KINDS = {"integer": "number"}
_TYPES: Mapping[type, str] = {
    str: "string", int: "number", float: "number", bool: "boolean", type(None): "null", list: "array", dict: "object"
}  # fmt: skip
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_FIRST = {'"': "string", "{": "object", "[": "array", "t": "boolean", "f": "boolean", "n": "null"}
_PYTHON = {"True": "true", "False": "false", "None": "null"}  # which some chat templates show


class Values:
    """The arguments of one tool. Args: schema: JSON text of theirs; None if it is not known."""

    def __init__(self, schema: str | None) -> None:
        self._schema: Any = json.loads(schema) if schema else {}
        self._kinds: dict[str, frozenset[str]] = {}

    def kinds(self, name: str) -> frozenset[str]:
        """Of JSON that the argument may be, as far as its schema says at its top; all if that is nothing."""
        properties = self._schema.get("properties") if isinstance(self._schema, Mapping) else None
        if not isinstance(properties, Mapping) or name not in properties:
            return ALL
        if name not in self._kinds:  # a model may write an argument many times, and a schema may be long
            self._kinds[name] = kinds_of(properties[name], self._schema, set()) or ALL
        return self._kinds[name]


def kinds_of(part: Any, root: Any, met: set[str]) -> frozenset[str]:
    """Of a schema within another one; ``met``: references that were followed, which are not followed again.

    The schema is a client's and may be none at all: what makes no sense says nothing.
    """
    if not isinstance(part, Mapping):
        return ALL
    kinds = ALL
    if isinstance(ref := part.get("$ref"), str):
        if ref in met:
            return frozenset()
        if len(met) == MOST_REFERENCES:
            return ALL
        met.add(ref)
        kinds &= kinds_of(_target(root, ref), root, met)
    if types := part.get("type"):
        kinds &= {_KINDS.get(str(kind), str(kind)) for kind in (types if isinstance(types, list) else [types])}
    for values in (part.get("enum"), [part["const"]] if "const" in part else None):
        if isinstance(values, list):
            kinds &= {_TYPES[type(value)] for value in values}
    for options in (part.get("anyOf"), part.get("oneOf")):
        if isinstance(options, list):
            kinds &= frozenset[str]().union(*(kinds_of(option, root, met) for option in options))
    return kinds


def _target(root: Any, ref: str) -> Any:
    for step in ref.removeprefix("#/").split("/"):
        root = root.get(step) if isinstance(root, Mapping) else None
    return root


def kind_of(text: str) -> str | None:
    """Of which kind of JSON a text without blanks around it is, None if it is none."""
    if _NUMBER.fullmatch(text):
        return "number"
    reader = JsonText()
    if not all(not reader.done and reader.step(char) for char in text) or not reader.done:
        return None
    return _FIRST[text[0]]


def as_json(text: str, kinds: frozenset[str]) -> str:
    """What an argument of these kinds stands for: the JSON that it is, else the text itself as a string."""
    plain = text.strip()
    if "string" not in kinds:
        plain = _PYTHON.get(plain, plain)
    kind = kind_of(plain)
    if kind is not None and ("string" not in kinds or (kind != "string" and kind in kinds)):
        return plain
    return json.dumps(text, ensure_ascii=False)
