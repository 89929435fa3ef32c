"""What a user types or pipes, one message or command at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from penstock.base import InvalidRequest
from penstock.cli.terminal import note

QUOTES = '"""'
"""Begins and ends a message of several lines."""

Reader = Callable[[str], str | None]
"""The next line, asked for with a prompt; None at the end."""


def inputs(interactive: bool) -> Iterator[str]:
    """Messages and commands until the input ends; blank ones are passed over.

    A line that begins with QUOTES, or the command /multiline, begins a message that goes on to a line that ends with
    QUOTES. On a terminal, Ctrl-C gives up what is being typed, and lines can be edited and recalled.
    """
    read = _typed() if interactive else _piped()
    while True:
        try:
            if (line := read(">>> ")) is None:
                return
            text = line.strip()
            if text == "/multiline":
                text = QUOTES
            if text.startswith(QUOTES):
                text = _block(text.removeprefix(QUOTES), read)
        except KeyboardInterrupt:
            if not interactive:
                raise
            note("\n(Ctrl-D or /exit ends the program)")
            continue
        if text:
            yield text


def _block(first: str, read: Reader) -> str:
    """The rest of a message of several lines."""
    parts = [first] if first else []
    while not (parts and parts[-1].endswith(QUOTES)):
        if (line := read("... ")) is None:
            break
        parts.append(line)
    return "\n".join(parts).removesuffix(QUOTES).strip()


def _piped() -> Reader:
    lines = enumerate(sys.stdin.buffer, 1)

    def read(_: str) -> str | None:
        number, line = next(lines, (0, b""))
        try:
            return line.decode("utf-8").rstrip("\r\n") if number else None
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                "invalid_text",
                f"Line {number} of stdin is not UTF-8 text",
                why=f"byte {error.start} cannot be decoded",
                fix="convert it, as with iconv -t utf-8",
            ) from None

    return read


def _typed() -> Reader:
    _edit_lines()

    def read(prompt: str) -> str | None:
        try:
            return input(prompt)
        except EOFError:
            note("")
            return None

    return read


def _edit_lines() -> None:
    """Line editing, history and completion of commands, where Python has them."""
    try:
        import readline
    except ImportError:
        return
    from penstock.cli.chat_commands import COMMANDS

    def complete(text: str, state: int) -> str | None:
        found = [name for name in COMMANDS if text.startswith("/") and name.startswith(text)]
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
