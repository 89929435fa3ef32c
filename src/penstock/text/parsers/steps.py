"""The steps that formats are made of. Each is sent one character at a time and leaves it withheld in the output."""

from __future__ import annotations

import json
from collections.abc import Generator

from penstock.text.completion import StopStrings
from penstock.text.parsers.jsontext import BLANKS, JsonText
from penstock.text.parsers.output import Ended, Output

Read = Generator[None, str, bool]
"""Whether the text was of the form; if not, the character that was not comes again."""

ARGUMENTS = ("arguments", "parameters")
MEMBERS = frozenset({"name", *ARGUMENTS, "type", "id"})


def marker(output: Output, *markers: str) -> Generator[None, str, str]:
    """Releases content up to one of some markers, which is returned and withheld."""
    seen = StopStrings(markers)
    output.plain = "".join(mark[0] for mark in markers)
    while True:
        char = yield
        found = seen.feed(char)
        output.release(keep=len(found[0]) if found else seen.held)
        output.plain = None if seen.held or found else "".join(mark[0] for mark in markers)
        if found:
            return found[0]


def nonblank(output: Output) -> Generator[None, str, str]:
    """The first character that is not a blank."""
    while True:
        char = yield
        if char not in BLANKS:
            return char


def exactly(output: Output, text: str) -> Read:
    for expected in text:
        if (yield) != expected:
            output.unread()
            return False
    return True


def either(output: Output, *texts: str) -> Generator[None, str, str | None]:
    """Blanks, then one of some texts of which none begins another; None if it is something else."""
    read = yield from nonblank(output)
    while read not in texts:
        if not any(text.startswith(read) for text in texts):
            output.unread()
            return None
        read += yield
    return read


def blanks_then(output: Output, text: str) -> Read:
    return (yield from either(output, text)) is not None


def either_or_end(output: Output, *texts: str) -> Generator[None, str, str | None]:
    """As ``either``. A call that is whole ends if the text ends first."""
    try:
        return (yield from either(output, *texts))
    except Ended:
        output.end()
        raise


def up_to(output: Output, text: str) -> Read:
    """Blanks, then ``text``. A call that is whole ends if the text ends first."""
    return (yield from either_or_end(output, text)) is not None


def taken(output: Output, mark: str, most: int) -> Generator[None, str, str | None]:
    """The text before a mark, which is read too; None if it has more than ``most`` characters."""
    seen, text = StopStrings((mark,)), ""
    while len(text) <= most + len(mark):
        char = yield
        text += char
        if seen.feed(char):
            return text.removesuffix(mark)
    return None


def arguments(output: Output, name: str) -> Read:
    """A call's arguments alone: a JSON object."""
    reader = JsonText()
    while not reader.done:
        char = yield
        if not (reader.depth or char == "{") or not reader.step(char):
            output.unread()
            return False
        if reader.depth == 1 and char == "{" and reader.state == "key":
            output.start(name)
        output.arguments(char)
    return True


def call(output: Output, *, bare: bool = False) -> Read:
    """A JSON object with the name of a tool and its arguments, under either of their names and in either order.

    Arguments are told as they come once the name is known. Other members are passed over. Arguments may also be JSON
    in a string, or null for none.

    Args:
        bare: nothing else says that this is a call, so that arguments must be there, and no members but MEMBERS.
    """
    reader, members = JsonText(), _Members(output, bare=bare)
    while not reader.done:
        char = yield
        before, key = reader.depth, reader.in_key
        if not before and char not in "{" + BLANKS:
            output.unread()
            return False
        if not reader.step(char) or not members.take(char, reader, before, key):
            output.unread()
            return False
    return members.complete()


class _Members:
    """The members of a call's object, as they are read."""

    def __init__(self, output: Output, *, bare: bool) -> None:
        self._output, self._bare = output, bare
        self._key = ""
        self._text: list[str] = []
        self._reading = False  # the text of a key or of a value of the outermost object
        self._name: str | None = None
        self._arguments: str | None = None
        self._streaming = False

    def take(self, char: str, reader: JsonText, before: int, in_key: bool) -> bool:
        """One character, after the reader took it; ``before``: the depth ahead of it."""
        depth, state = reader.depth, reader.state
        if in_key and depth == 1 == before:
            self._text.append(char)
            if state == "colon":
                self._key, self._text = json.loads("".join(self._text)), []
                return not self._bare or self._key in MEMBERS
            return True
        if depth == 1 and before == 1 and state == "string" and reader.is_key:  # its first quote
            self._text = [char]
            return True
        ended = before == 1 and char in ",}" and state != "string" and self._reading
        if ended:
            self._reading = False
            return self._value("".join(self._text).strip())
        if before == 1 and char == ":" and state == "value" and not self._reading:
            self._reading, self._text = True, []
            return True
        if self._reading:
            return self._more(char, depth)
        return True

    def _more(self, char: str, depth: int) -> bool:
        if self._streaming:
            self._output.arguments(char)
            self._streaming = depth > 1
            return True
        self._text.append(char)
        if self._key in ARGUMENTS and self._name is not None and char == "{" and depth == 2:
            if self._arguments is not None:
                return False
            self._output.start(self._name)
            self._output.arguments("{")
            self._arguments, self._streaming, self._key = "", True, ""
        return True

    def _value(self, text: str) -> bool:
        """A member is complete."""
        key, self._text = self._key, []
        if key == "name":
            name = json.loads(text) if self._name is None and text.startswith('"') else None
            if name not in self._output.tools:
                return False
            self._name = name
        elif key in ARGUMENTS:
            found = _object(text) if self._arguments is None else None
            if found is None:
                return False
            self._arguments = found
        return True

    def complete(self) -> bool:
        if self._name is None or (self._bare and self._arguments is None):
            return False
        if self._arguments != "":
            self._output.start(self._name)
            self._output.arguments(self._arguments or "{}")
        return True


def _object(text: str) -> str | None:
    """JSON text of an object: as it is, in a string, or null; None for anything else."""
    if text.startswith('"'):
        text = str(json.loads(text)).strip()
        reader = JsonText()
        if not all(not reader.done and reader.step(char) for char in text) or not reader.done:
            return None
        if any("\ud800" <= char <= "\udfff" for char in text):  # half a character, which nobody could be sent
            return None
    if text == "null":
        return "{}"
    return text if text.startswith("{") else None
