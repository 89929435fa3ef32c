"""Calls one after another, without a marker around each: in a row, or in a JSON list."""

from __future__ import annotations

from penstock.text.parsers.output import Ended, Output, Steps
from penstock.text.parsers.steps import Read, call, nonblank


def in_a_row(output: Output, *, bare: bool) -> Read:
    """Calls up to the end of the text, with blanks, a semicolon or a comma between them."""
    while (yield from call(output, bare=bare)):
        try:
            char = yield from nonblank(output)
        except Ended:
            output.end()
            raise
        if char not in ";,{":
            output.unread()
            return False
        output.end(keep=1)
        if char != "{":
            yield from nonblank(output)
        output.unread()
    return False


def in_a_list(output: Output, *, bare: bool) -> Read:
    """The members of a list whose bracket has been read, up to its end, or to that of the text after a whole call."""
    while (yield from call(output, bare=bare)):
        try:
            char = yield from nonblank(output)
        except Ended:
            output.end()
            raise
        if char == "]":
            output.end()
            return True
        if char != ",":
            output.unread()
            return False
        output.end(keep=1)
    return False


def list_or_row(output: Output, *, bare: bool) -> Steps:
    """What comes after a marker, or at the start of the text. What is no call is content."""
    char = yield from nonblank(output)
    if char == "[":
        yield from in_a_list(output, bare=bare)
    else:
        output.unread()
        if char == "{":
            yield from in_a_row(output, bare=bare)
    output.drop()
