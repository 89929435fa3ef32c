"""What references make of a schema: one that only an infinite value satisfies, such as an object that requires another
one like itself, or one so deep that compilers run out of stack.

A value is finite if it can be built from the inside out. So the references are taken for unsatisfiable at first, and
those are freed, round by round, whose target can be satisfied with what is free already: a least fixed point. What the
rules below do not look at counts as satisfiable, so that no sound schema is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote

MAX_STEPS = 200_000
"""Schemas that are looked at, references followed; beyond that all is taken for finite. About a tenth of a second."""

_SCALARS = frozenset(("null", "boolean", "number", "integer", "string"))
_TYPES = _SCALARS | {"array", "object"}


def infinite_part(schema: Any, *, bare_refs: bool) -> str | None:
    """The reference that makes a schema require itself for ever, None if it does not.

    Args:
        bare_refs: nothing beside a ``$ref`` counts, as up to draft 7.
    """
    if not isinstance(schema, Mapping):
        return None
    search = _Search(schema, bare_refs=bare_refs)
    while not search.finite(schema, _TYPES):
        if not search.free_some():
            return next(iter(search.held))[0]
    return None


def depth(schema: Any, refs: Iterable[str]) -> int:
    """How deep mappings can nest at most where every reference of the schema is followed, each one once."""
    whole = _height(schema)
    targets = (_at(schema, ref) if ref.startswith("#") else None for ref in refs)
    return whole + sum(whole if target is None else _height(target) for target in targets)


def _height(part: Any) -> int:
    if isinstance(part, Mapping):
        return 1 + max(map(_height, part.values()), default=0)
    return max(map(_height, part), default=0) if isinstance(part, list) else 0


class _Search:
    """References are kept with the types that their place allows."""

    def __init__(self, root: Mapping[str, Any], *, bare_refs: bool) -> None:
        self.root, self.bare_refs, self.steps = root, bare_refs, 0
        self.held: dict[tuple[str, frozenset[str]], None] = {}
        self.free: set[tuple[str, frozenset[str]]] = set()

    def free_some(self) -> bool:
        """One round over the references that are held; False if it changed nothing."""
        before = len(self.held), len(self.free)
        for place in list(self.held):
            if self.finite(_at(self.root, place[0]), place[1]):
                self.free.add(place)
                del self.held[place]
        return before != (len(self.held), len(self.free))

    def finite(self, schema: Any, types: frozenset[str]) -> bool:
        """Whether a finite value of one of the types may satisfy the schema."""
        self.steps += 1
        if self.steps > MAX_STEPS or not isinstance(schema, Mapping):
            return True
        if schema is not self.root and ("$id" in schema or "id" in schema):  # its references start there
            return True
        own = schema.get("type", list(_TYPES))
        types &= frozenset(entry for entry in (own if isinstance(own, list) else [own]) if isinstance(entry, str))
        if isinstance(ref := schema.get("$ref"), str):
            if not self._ref(ref, types):
                return False
            if self.bare_refs:
                return True
        if "enum" in schema or "const" in schema:
            return True
        if not all(self.finite(part, types) for part in _list(schema, "allOf")):
            return False
        for keyword in ("anyOf", "oneOf"):
            if (parts := _list(schema, keyword)) and not any(self.finite(part, types) for part in parts):
                return False
        return (
            not types  # nothing satisfies it at all: for others to say
            or bool(types & _SCALARS)
            or ("object" in types and self._object(schema))
            or ("array" in types and self._array(schema))
        )

    def _ref(self, ref: str, types: frozenset[str]) -> bool:
        if ref != "#" and not ref.startswith("#/"):
            return True
        if (ref, types) in self.free:
            return True
        self.held[ref, types] = None
        return False

    def _object(self, schema: Mapping[str, Any]) -> bool:
        listed = schema.get("properties")
        listed = listed if isinstance(listed, Mapping) else {}
        rest = True if "patternProperties" in schema else schema.get("additionalProperties")
        names = (name for name in _list(schema, "required") if isinstance(name, str))
        return all(self.finite(listed.get(name, rest), _TYPES) for name in names)

    def _array(self, schema: Mapping[str, Any]) -> bool:
        needed = schema.get("minItems")
        if not isinstance(needed, (int, float)) or needed < 1:
            return True
        items = schema.get("items")
        first, rest = (items, schema.get("additionalItems")) if isinstance(items, list) else ([], items)
        first = (_list(schema, "prefixItems") or first)[: int(min(needed, MAX_STEPS))]
        return all(self.finite(item, _TYPES) for item in first) and (needed <= len(first) or self.finite(rest, _TYPES))


def _list(schema: Mapping[str, Any], keyword: str) -> list[Any]:
    value = schema.get(keyword)
    return value if isinstance(value, list) else []


def _at(root: Any, pointer: str) -> Any:
    """What a JSON pointer (RFC 6901) in a fragment points to, None if there is nothing."""
    for step in unquote(pointer.removeprefix("#")).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(root, Mapping) and name in root:
            root = root[name]
        elif isinstance(root, list) and name.isdecimal() and int(name) < len(root):
            root = root[int(name)]
        else:
            return None
    return root
