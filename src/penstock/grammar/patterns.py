r"""Look-ahead at the start of a pattern, as people write it for passwords and reserved names: ``^(?=.*\d)(?!tmp)...``.

Regular languages are closed under it: the text must (not) match each look-ahead from the same place, and the rest.
Anywhere else, and for look-behind, there is no such simple form.
"""

from __future__ import annotations

from typing import NamedTuple


class Lookaheads(NamedTuple):
    """Patterns that a text must match, must not match, and what is left of the pattern."""

    needed: list[str]
    forbidden: list[str]
    rest: str


def lookaheads(pattern: str) -> Lookaheads:
    """Takes look-aheads off the front of an anchored pattern; each part is a pattern of its own."""
    found = Lookaheads([], [], pattern)
    while found.rest.startswith(("^(?=", "^(?!")):
        if (end := _closing(found.rest, 1)) is None:
            break
        inner, rest = found.rest[4:end], "^" + found.rest[end + 1 :]
        if rest[1:2] in ("*", "+", "?", "{"):  # a repeated look-ahead
            break
        (found.needed if found.rest[3] == "=" else found.forbidden).append(f"^(?:{inner.removeprefix('^')})")
        found = found._replace(rest=rest)
    return found


def is_cut(pattern: str) -> bool:
    """Whether a pattern ends in a backslash that escapes nothing, which the grammar engine would overlook."""
    return (len(pattern) - len(pattern.rstrip("\\"))) % 2 == 1


def _closing(pattern: str, start: int) -> int | None:
    """Index of the bracket that closes the group at ``start``."""
    depth, in_class, at = 0, False, start
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 1
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char == "(":
            depth += 1
        elif char == ")":
            depth -= 1
            if depth == 0:
                return at
        at += 1
    return None
