"""StructuredOutputs: what form a completion must have. Names, meaning and defaults are vLLM's."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass, fields
from typing import Any, Self

from penstock.base import InvalidRequest
from penstock.spec.ranges import extent

MAX_GRAMMAR_CHARS = 1 << 20
MAX_SCHEMA_DEPTH = 128
MAX_CHOICES = 10_000

MAX_STRUCTURES = 256

_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_HELD: dict[str, tuple[type, ...]] = {"schema": (dict, bool), "regex": (str,), "lark": (str,)}
"""What a structure may be held to."""
_NOT_YET = ("disable_additional_properties", "whitespace_pattern")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """A completion must be one whole word of a language; exactly one of the first six says which.

    Values are small, immutable and hashable once made: equal ones ask for the same grammar.

    Attributes:
        json: a JSON schema, given as JSON text, a mapping or a boolean; kept as JSON text.
        regex: a regular expression that the whole completion matches.
        choice: the strings it may be.
        grammar: an EBNF grammar, either in llguidance's dialect of Lark (``start: ...``) or in GBNF (``root ::= ...``).
        json_object: any JSON object.
        structural_tag: free text in which marked structures hold JSON, as JSON text or a mapping: ``structures``, each
            with ``begin``, ``schema`` and ``end``, and ``triggers``; the rest is told in ``grammar/tags.py``.
        disable_any_whitespace: JSON without spaces and newlines between its parts.
        disable_fallback: accepted for compatibility; there is one grammar engine.

    Raises:
        InvalidRequest: (invalid_parameter) none or several kinds, or a value of the wrong type or size;
            (invalid_schema) the schema is not JSON; (unsupported_parameter) a field of vLLM's that this build cannot
            honour.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Iterable[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False

    disable_fallback: InitVar[bool] = False
    disable_additional_properties: InitVar[bool] = False
    whitespace_pattern: InitVar[str | None] = None

    def __post_init__(self, disable_fallback: bool, *not_yet: object) -> None:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if self.json_object is False:  # of json, false is a schema, though nothing satisfies it
            given.remove("json_object")
        if len(given) != 1:
            raise InvalidRequest(
                "invalid_parameter",
                "structured_outputs needs exactly one kind",
                why=f"it has {', '.join(given) or 'none'}",
                fix=f"give one of {', '.join(_KINDS)}",
            )
        for name, value in zip(_NOT_YET, not_yet, strict=True):
            if value:
                raise InvalidRequest(
                    "unsupported_parameter", f"structured_outputs.{name} is not in this build yet", fix="leave it out"
                )
        _expect("json_object", self.json_object in (None, False, True), self.json_object, "it must be true or false")
        flag = self.disable_any_whitespace
        _expect("disable_any_whitespace", isinstance(flag, bool), flag, "it must be true or false")
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.structural_tag is not None:
            object.__setattr__(self, "structural_tag", _tags_text(self.structural_tag))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for name in ("json", "regex", "grammar", "structural_tag"):
            if (text := getattr(self, name)) is not None:
                _check_text(name, text)
        object.__setattr__(self, "json_object", True if self.json_object else None)

    @classmethod
    def of(cls, value: object) -> Self:
        """From an instance or from a mapping of its fields, as it comes over a wire.

        Raises:
            InvalidRequest: as the constructor; (invalid_parameter) an unknown field.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise _invalid("structured_outputs", value, "it must be StructuredOutputs or a mapping of its fields")
        known = {field.name for field in fields(cls)} | {"disable_fallback", *_NOT_YET}
        for name in value:
            _expect(f"structured_outputs.{name}", name in known, value[name], "there is no such field")
        return cls(**{name: entry for name, entry in value.items() if entry is not None})

    @property
    def kind(self) -> str:
        """The name of the field that is set."""
        return next(name for name in _KINDS if getattr(self, name) is not None)


def _schema_text(schema: object, name: str = "json") -> str:
    """Of what is small enough, which is looked at before it is read or written."""
    try:
        _check_length(name, len(schema) if isinstance(schema, str) else 0)
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        depth, chars = extent(parsed, MAX_GRAMMAR_CHARS, MAX_SCHEMA_DEPTH)
        if depth > MAX_SCHEMA_DEPTH:
            why = f"at most {MAX_SCHEMA_DEPTH} brackets within brackets are allowed"
            raise InvalidRequest(
                "invalid_schema", f"structured_outputs.{name} is nested too deeply", why=why, fix="flatten it"
            )
        _check_length(name, chars)
        text = json.dumps(parsed, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (ValueError, TypeError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequest(
            "invalid_schema", f"structured_outputs.{name} is not JSON", why=why[:200], fix="send a JSON schema"
        ) from None
    if not isinstance(parsed, (Mapping, bool)):
        why = f"it is {reprlib.repr(parsed)}"
        raise InvalidRequest(
            "invalid_schema", "A JSON schema must be an object, true or false", why=why, fix="send {} for any JSON"
        )
    return text


def _check_length(name: str, chars: int) -> None:
    if chars > MAX_GRAMMAR_CHARS:
        why = f"it has {chars:,} characters or more, at most {MAX_GRAMMAR_CHARS:,} are allowed"
        raise InvalidRequest("invalid_parameter", f"structured_outputs.{name} is too long", why=why, fix="shorten it")


def _tags_text(value: object) -> str:
    text = _schema_text(value, "structural_tag")
    tags = json.loads(text)
    structures = tags.get("structures") if isinstance(tags, dict) else None
    least = 0 if isinstance(tags, dict) and "answer" in tags else 1
    fits = isinstance(structures, list) and least <= len(structures) <= MAX_STRUCTURES
    _expect("structural_tag", fits, value, f"it must have 1 to {MAX_STRUCTURES} structures")
    for structure in structures or ():
        kinds = _HELD.keys() & structure if isinstance(structure, dict) else ()
        whole = len(kinds) == 1 and all(isinstance(structure[kind], _HELD[kind]) for kind in kinds)
        texts = whole and all(isinstance(structure.get(name), str) for name in ("begin", "end"))
        why = "a structure has begin and end, texts, and one of schema, regex and lark"
        _expect("structural_tag", texts, structure, why)
        field = structure.get("field", ["", "e"])
        texts = isinstance(field, list) and len(field) == 2 and all(isinstance(part, str) for part in field)
        _expect("structural_tag", texts and bool(field[1]), field, "field must be two texts, the second not empty")
    for name in ("first", "between", "last", "says"):
        _expect("structural_tag", isinstance(tags.get(name, ""), str), tags.get(name), f"{name} must be a text")
    thoughts = tags.get("thoughts") or {"start": ["a"], "end": ["a"]}
    lists = [tags.get("triggers", []), *(isinstance(thoughts, dict) and thoughts.get(key) for key in ("start", "end"))]
    for texts in lists:
        fits = isinstance(texts, list) and len(texts) <= MAX_STRUCTURES and all(isinstance(t, str) and t for t in texts)
        _expect("structural_tag", fits, texts, "triggers, and start and end of thoughts, must be lists of texts")
    _expect("structural_tag", isinstance(tags.get("answer", True), (dict, bool)), value, "answer must be a schema")
    return text


def _choices(choice: object) -> tuple[str, ...]:
    is_list = isinstance(choice, Iterable) and not isinstance(choice, (str, bytes, Mapping))
    _expect("choice", is_list, choice, "it must be a list of strings")
    entries: tuple[Any, ...] = tuple(choice)  # type: ignore[arg-type]
    _expect("choice", 0 < len(entries) <= MAX_CHOICES, entries, f"it must have 1 to {MAX_CHOICES} entries")
    for entry in entries:
        _expect("choice", isinstance(entry, str) and bool(entry), entry, "each entry must be a string, and not empty")
    _check_length("choice", sum(map(len, entries)))
    for entry in entries:
        _check_text("choice", entry)
    return entries


def _check_text(name: str, text: object) -> None:
    _expect(name, isinstance(text, str), text, "it must be a string")
    assert isinstance(text, str)
    _expect(name, bool(text), text, "it is empty")
    _check_length(name, len(text))
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _invalid(f"structured_outputs.{name}", text, "it holds a lone surrogate, which is no character") from None


def _expect(name: str, ok: bool, value: object, why: str) -> None:
    if not ok:
        raise _invalid(name if "." in name else f"structured_outputs.{name}", value, why)


def _invalid(name: str, value: object, why: str) -> InvalidRequest:
    return InvalidRequest("invalid_parameter", f"{name} = {reprlib.repr(value)} cannot be used", why=why)
