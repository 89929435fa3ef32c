"""Mistral: [TOOL_CALLS] and a JSON list (up to its tokenizer's version 7), or name{...} or name[ARGS]{...} since."""

from __future__ import annotations

from collections.abc import Generator

from penstock.spec.tools import CallShape
from penstock.text.parsers.listed import in_a_list
from penstock.text.parsers.output import Output, Steps
from penstock.text.parsers.steps import arguments, exactly, marker, nonblank

CALLS, ARGS, ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
MAX_NAME = 128

SHAPE = CallShape(
    trigger=CALLS, begin='{{"name": {name}, "arguments": ', end="}", between=", ", first=CALLS + "[", last="]"
)
NEW_SHAPE = CallShape(trigger=CALLS, begin=CALLS + "{bare_name}" + ARGS, end="", between="", first="", last="")


def mistral(output: Output) -> Steps:
    while True:
        yield from marker(output, CALLS)
        char = yield from nonblank(output)
        if char == "[":
            yield from in_a_list(output, bare=False)
        else:
            output.unread()
            name = yield from _name(output)
            if name in output.tools and (yield from arguments(output, name)):
                output.end()
        output.drop()


def _name(output: Output) -> Generator[None, str, str]:
    """The name before an object, which is not read; "" if there is none."""
    name = ""
    while len(name) <= MAX_NAME:
        char = yield
        if char == "{" or (char == "[" and name):
            output.unread()
            if char == "[" and not (yield from _tag(output)):
                return ""
            return name.rstrip()
        if not (char.isalnum() or char in "_.- "):
            output.unread()
            return ""
        name += char
    return ""


def _tag(output: Output) -> Generator[None, str, bool]:
    """[ARGS], or [CALL_ID] with an id and then [ARGS]."""
    yield from exactly(output, "[")
    char = yield
    output.unread()
    if char != "C":
        return (yield from exactly(output, ARGS[1:]))
    if not (yield from exactly(output, ID[1:])):
        return False
    for _ in range(MAX_NAME):
        char = yield
        if char == "[":
            return (yield from exactly(output, ARGS[1:]))
        if not char.isalnum():
            output.unread()
            return False
    return False
