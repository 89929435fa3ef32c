"""Structures in a text, such as calls of tools: marked places where a JSON schema holds, and free text between them.

The public form is vLLM's ``structural_tag``: ``structures`` with ``begin``, ``schema`` and ``end``, and ``triggers``,
with which one starts. What a call of a tool needs beyond that is said by further members:

| member | meaning |
| --- | --- |
| ``first``, ``between``, ``last`` | written around and between structures that follow each other |
| ``at_least``, ``at_most`` | how many; with at least one there is no free text |
| ``thoughts`` | ``start`` and ``end``, lists of texts: thoughts may come first; ``opened``: they have begun already |
| ``answer`` | a JSON schema, which the text is an instance of if there is no structure; then none need be offered |
| ``says`` | with what a text starts that has no structure |

A structure may have a ``field``: its arguments are then written one by one as plain text, in the order of the schema,
each between these two texts, in the first of which ``{key}`` is its name.

In place of the schema it may have ``regex`` or ``lark``: between ``begin`` and ``end`` there is then a text of that
expression or grammar, written as within the quotes of a JSON string, or plainly between the two texts of ``field``.

Without triggers only the start of a text tells whether it is a structure: a free text does not start like JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.grammar.fields import FieldWriter, without
from penstock.grammar.schema import exact, references
from penstock.grammar.texts import terminal, text_grammar, unanchored
from penstock.grammar.tokens import TokenTable

TEXT = "TEXT: /(.|\\n)*/"
KEY = "KEY: /[^<>\\n]+/"
PLAIN = "PLAIN: /([^ \\t\\r\\n{\\[](.|\\n)*)?/"


def tags_grammar(tags: Mapping[str, Any], table: TokenTable) -> str:
    """In llguidance's form.

    Raises:
        InvalidRequest: invalid_regex, invalid_grammar, grammar_too_large.
        ValueError: a structure begins with no trigger, or demands what cannot be held in its form.
    """
    return _Writer(tags, table).source()


class _Writer:
    def __init__(self, tags: Mapping[str, Any], table: TokenTable) -> None:
        self._tags = tags
        self._special = {table.token_bytes[i].decode(errors="replace"): i for i in table.special}
        words = sorted(filter(None, self._special), key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, words)) or "(?!)")
        self._rules: list[str] = []
        self._texts: dict[str, str] = {}

    def source(self) -> str:
        """Texts have grammars of their own, whose names are not those of others."""
        grammars = [{"lark_grammar": self._grammar()}]
        grammars += [{"name": name, "lark_grammar": text} for name, text in self._texts.items()]
        return json.dumps({"grammars": grammars})

    def _grammar(self) -> str:
        tags = self._tags
        structures, triggers = tags["structures"], tags.get("triggers") or []
        if not structures:
            body = f"{self._literal(tags.get('says') or '')} {_json(tags['answer'])}"
        elif tags.get("at_least"):
            body = self._group(structures, "")
        elif "answer" in tags and ((tags.get("first") or "") + structures[0]["begin"]).startswith("{"):
            options = [_whole(structure) for structure in structures]
            body = _json({"anyOf": [*options, tags["answer"]]})
        elif "answer" in tags:
            body = f"{self._group(structures, '')} | {self._literal(tags.get('says') or '')} {_json(tags['answer'])}"
        elif tags.get("says"):
            body = f"{self._group(structures, '')} | {self._literal(tags['says'])} TEXT"
        elif triggers:
            body = self._in_text(structures, triggers)
        else:
            body = f"{self._group(structures, '')} | PLAIN"
        self._rules.append(f"body: {body}")
        return "\n".join([f"start: {self._thoughts()}", *self._rules, TEXT, KEY, PLAIN, ""])

    def _thoughts(self) -> str:
        thoughts = self._tags.get("thoughts")
        if not thoughts:
            return "body"
        ends = " | ".join(f"thought_{i} BLANK" for i in range(len(thoughts["end"])))
        self._rules += [self._head(f"thought_{i}", end) for i, end in enumerate(thoughts["end"])]
        self._rules += [f"thoughts: {ends}", "BLANK: /[ \\n]*/"]
        starts = " | ".join(map(self._literal, thoughts["start"]))
        return "thoughts body" if thoughts.get("opened") else f"body | ({starts}) thoughts body"

    def _in_text(self, structures: Sequence[Mapping[str, Any]], triggers: Sequence[str]) -> str:
        groups = []
        for i, trigger in enumerate(triggers):
            own = [s for s in structures if ((self._tags.get("first") or "") + s["begin"]).startswith(trigger)]
            if own:
                self._rules.append(self._head(f"head_{i}", trigger))
                groups.append(f"head_{i} {self._group(own, trigger)}")
        if not groups:
            raise ValueError("no structure begins with a trigger")
        self._rules.append(f"tagged: {' | '.join(groups)}")
        return "TEXT | tagged" if self._tags.get("at_most") == 1 else "tagged* TEXT"

    def _head(self, name: str, mark: str, text: str = "TEXT") -> str:
        """Free text up to a mark."""
        if self._split.match(mark):
            return f"{name}: {text} {self._literal(mark)}"
        return f"{name}[lazy]: {text} {json.dumps(mark)}"

    def _group(self, structures: Sequence[Mapping[str, Any]], read: str) -> str:
        """One or more structures, of which ``read`` has been read."""
        first, between, last = (self._tags.get(name) or "" for name in ("first", "between", "last"))
        number = len(self._rules)
        options = []
        for i, structure in enumerate(structures):
            begin = structure["begin"] if first else structure["begin"].removeprefix(read)
            end = self._literal(structure["end"])
            inner = self._inner(f"{number}_{i}", structure)
            self._rules.append(f"one_{number}_{i}: {self._literal(begin)} {inner} {end}")
            options.append(f"one_{number}_{i}")
        self._rules.append(f"any_{number}: {' | '.join(options)}")
        more = (
            ""
            if self._tags.get("at_most") == 1 or (read and not first)
            else f"({self._literal(between)} any_{number})*"
        )
        return f"({self._literal(first.removeprefix(read))} any_{number} {more} {self._literal(last)})"

    def _inner(self, name: str, structure: Mapping[str, Any]) -> str:
        for kind in ("regex", "lark"):
            if kind in structure:
                return self._text(name, kind, structure[kind], structure.get("field"))
        if "field" not in structure:
            return _json(structure["schema"])
        begin, end = structure["field"]
        writer = FieldWriter(name, begin, end, self._literal, self._head)
        fields = writer.fields(structure["schema"])
        self._rules += writer.rules
        return fields

    def _text(self, name: str, kind: str, definition: str, field: Sequence[str] | None) -> str:
        grammar = text_grammar(kind, definition, quoted=field is None)
        if field is None:
            self._texts[f"text_{name}"] = grammar
            return f"@text_{name}"
        if kind == "lark":
            raise ValueError("a text that is written plainly cannot be held to a grammar in Lark")
        begin, end = field
        self._rules.append(f"TEXT_{name}: {terminal(unanchored(definition))} & {without(end.strip())}")
        self._rules.append(self._head(f"text_{name}", end, f"TEXT_{name}"))
        return f"{self._literal(begin)} text_{name}"

    def _literal(self, text: str) -> str:
        """With special tokens as such."""
        parts, at = [], 0
        for found in self._split.finditer(text):
            parts += [json.dumps(text[at : found.start()])] if found.start() > at else []
            parts.append(f"<[{self._special[found[0]]}]>")
            at = found.end()
        return " ".join([*parts, json.dumps(text[at:])] if at < len(text) else parts)


def _whole(structure: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a structure that is a JSON object, whose text the lexer could not tell from an answer's.

    Raises:
        ValueError: its own schema has references, which would lead elsewhere; or it has none.
    """
    if "schema" not in structure:
        raise ValueError("a tool's input of a grammar, beside the form of an answer, in a format without marks")
    if references(structure["schema"]):
        raise ValueError("$ref in a tool, beside the form of an answer, in a format without marks")
    members = json.loads(f"{structure['begin']}null{structure['end']}")
    fixed = {name: {"const": value} for name, value in members.items() if value is not None}
    hole = {name: structure["schema"] for name, value in members.items() if value is None}
    return {"type": "object", "properties": fixed | hole, "required": list(members), "additionalProperties": False}


def _json(schema: Any) -> str:
    return f"%json {json.dumps(exact(schema))}"
