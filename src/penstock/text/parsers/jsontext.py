"""JSON text, one character at a time: whether it can still become JSON, and when it is (RFC 8259)."""

from __future__ import annotations

MAX_DEPTH = 100
"""Deeper values are taken for something else: whoever reads them later may go down on its stack."""

BLANKS = " \t\n\r"
_NUMBER = {  # state -> what may follow; the states that may end a number
    "-": {"0": "0", "1": "1"},
    "0": {".": ".", "e": "e"},
    "1": {"0": "1", "1": "1", ".": ".", "e": "e"},
    ".": {"0": "f", "1": "f"},
    "f": {"0": "f", "1": "f", "e": "e"},
    "e": {"0": "x", "1": "x", "+": "+"},
    "+": {"0": "x", "1": "x"},
    "x": {"0": "x", "1": "x"},
}
_WHOLE = frozenset("01fx")


class JsonText:
    """A reader of one JSON value.

    Attributes:
        depth: objects and arrays that are open.
        done: the value is complete. A number at the top never is: what follows would have to be seen.
        state: what is being read or must come next: ``value``, ``key``, ``colon``, ``after``, ``string``, ``escape``,
            ``hex``, ``number`` or ``word``.
    """

    def __init__(self) -> None:
        self.state = "value"
        self.done = False
        self.is_key = False
        self._open: list[str] = []
        self._may_close = False  # the array or object has no member yet
        self._left = ""  # of a word; the state of a number; "x" for each hex digit to come

    @property
    def in_key(self) -> bool:
        """Within the name of a member, its first quote read."""
        return self.is_key and self.state in ("string", "escape", "hex")

    @property
    def depth(self) -> int:
        return len(self._open)

    def step(self, char: str) -> bool:
        """Takes one character; False if no JSON goes on like that, after which the reader is of no more use."""
        if self.state == "string":
            return self._in_string(char)
        if self.state == "number":
            kind = "1" if char in "123456789" else "e" if char == "E" else "+" if char == "-" else char
            if (after := _NUMBER[self._left].get(kind)) is not None:
                self._left = after
                return True
            if self._left not in _WHOLE:
                return False
            self._value_ends()
        elif self.state in ("escape", "hex", "word"):
            return self._in_word(char)
        if char in BLANKS:
            return True
        return bool(char) and self._structure(char)

    def _in_string(self, char: str) -> bool:
        if char == '"':
            if self.is_key:
                self.state = "colon"
            else:
                self._value_ends()
        elif char == "\\":
            self.state = "escape"
        return char >= " "

    def _in_word(self, char: str) -> bool:
        """Of a fixed text such as ``true``, or of an escape in a string."""
        if self.state == "word":
            expected, self._left = self._left[0], self._left[1:]
            if not self._left:
                self._value_ends()
            return char == expected
        if self.state == "escape":
            self.state, self._left = ("hex", "xxxx") if char == "u" else ("string", "")
            return char in '"\\/bfnrtu'
        self._left = self._left[1:]
        self.state = "hex" if self._left else "string"
        return char in "0123456789abcdefABCDEF"

    def _structure(self, char: str) -> bool:
        may_close, self._may_close = self._may_close, False
        match self.state:
            case "after":
                if char == "," and self._open:
                    self.state = "key" if self._open[-1] == "{" else "value"
                    return True
                return self._close(char)
            case "colon":
                self.state = "value"
                return char == ":"
            case "key":
                if char == '"':
                    self.state, self.is_key = "string", True
                    return True
                return may_close and self._close(char)
        if char in "{[":
            self._open.append(char)
            self.state, self._may_close = ("key" if char == "{" else "value"), True
            return len(self._open) <= MAX_DEPTH
        if char == "]":
            return may_close and self._close(char)
        if char == '"':
            self.state, self.is_key = "string", False
        elif char in "-0123456789":
            self.state, self._left = "number", char if char in "-0" else "1"
        elif char in "tfn":
            self.state, self._left = "word", {"t": "rue", "f": "alse", "n": "ull"}[char]
        else:
            return False
        return True

    def _close(self, char: str) -> bool:
        if not self._open or {"{": "}", "[": "]"}[self._open.pop()] != char:
            return False
        self._value_ends()
        return True

    def _value_ends(self) -> None:
        self.state = "after"
        self.done = not self._open
