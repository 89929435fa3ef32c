"""Arguments that a format writes as plain text, one by one: which JSON they stand for, by the tool's schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from penstock.text.parsers.jsontext import JsonText

ALL = frozenset({"string", "number", "boolean", "null", "array", "object"})
STRING = frozenset({"string"})
MAX_REFERENCES = 16
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_FIRST = {'"': "string", "{": "object", "[": "array", "t": "boolean", "f": "boolean", "n": "null"}
_PYTHON = {"True": "true", "False": "false", "None": "null"}  # which some chat templates show


class Values:
    """The arguments of one tool. Args: schema: JSON text of theirs; None if it is not known."""

    def __init__(self, schema: str | None) -> None:
        self._schema: Any = json.loads(schema) if schema else {}

    def kinds(self, name: str) -> frozenset[str]:
        """Of JSON that the argument may be, as far as its schema says at its top."""
        properties = self._schema.get("properties") if isinstance(self._schema, Mapping) else None
        return kinds_of((properties or {}).get(name), self._schema)


def kinds_of(part: Any, root: Any, references: int = 0) -> frozenset[str]:
    """Of a schema within another one."""
    if not isinstance(part, Mapping):
        return ALL
    kinds = ALL
    if isinstance(ref := part.get("$ref"), str) and references < MAX_REFERENCES:
        kinds &= kinds_of(_target(root, ref), root, references + 1)
    if types := part.get("type"):
        named = types if isinstance(types, list) else [types]
        kinds &= {"number" if kind == "integer" else str(kind) for kind in named}
    if "enum" in part or "const" in part:
        values = part.get("enum", [part.get("const")])
        kinds &= {str(kind_of(json.dumps(value))) for value in values if isinstance(values, list)}
    for word in ("anyOf", "oneOf"):
        if isinstance(options := part.get(word), list):
            kinds &= frozenset().union(*(kinds_of(option, root, references + 1) for option in options))
    return kinds if references <= MAX_REFERENCES else ALL


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
