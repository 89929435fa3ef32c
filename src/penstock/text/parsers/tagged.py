"""Calls whose arguments are tagged one by one and written as plain text: Qwen3-Coder's, and GLM 4.5's."""

from __future__ import annotations

import json
from collections.abc import Generator

from penstock.spec.tools import CallShape, Field
from penstock.text.completion import StopStrings
from penstock.text.parsers.output import Output, Steps
from penstock.text.parsers.steps import Read, blanks_then, either, marker, taken, up_to
from penstock.text.parsers.values import STRING, as_json

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
KEY, END_KEY, VALUE, END_VALUE = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
MAX_NAME = 128

QWEN3_CODER = CallShape(
    trigger=OPEN,
    begin=OPEN + "\n" + FUNCTION + "{bare_name}>\n",
    end=END_FUNCTION + "\n" + CLOSE,
    between="\n",
    first="",
    last="",
    field=Field(PARAMETER + "{key}>\n", "\n" + END_PARAMETER + "\n"),
)
GLM = CallShape(
    trigger=OPEN,
    begin=OPEN + "{bare_name}\n",
    end=CLOSE,
    between="\n",
    first="",
    last="",
    field=Field(KEY + "{key}" + END_KEY + "\n" + VALUE, END_VALUE + "\n"),
)


def qwen3_coder(output: Output) -> Steps:
    """<tool_call><function=name><parameter=key>value</parameter></function></tool_call>; the outer tags may lack."""
    while True:
        mark = yield from marker(output, OPEN, FUNCTION, CLOSE)
        if mark == CLOSE:  # of a call that had no start
            output.forget() if output.after_call else output.release()
            continue
        if mark == FUNCTION or (yield from blanks_then(output, FUNCTION)):
            name = yield from taken(output, ">", MAX_NAME)
            whole = name in output.tools and (yield from _parameters(output, name))
            if whole and (mark == FUNCTION or (yield from up_to(output, CLOSE))):
                output.end()
                continue
        output.drop()


def _parameters(output: Output, name: str) -> Read:
    values, before = output.values(name), "{"
    output.start(name)
    while (tag := (yield from either(output, PARAMETER, END_FUNCTION))) == PARAMETER:
        if (key := (yield from taken(output, ">", MAX_NAME))) is None:
            return False
        output.arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
        yield from _value(output, values.kinds(key), f"\n{END_PARAMETER}", END_PARAMETER)
        before = ", "
    if tag is not None:
        output.arguments("{}" if before == "{" else "}")
    return tag is not None


def glm(output: Output) -> Steps:
    """<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>, with or without line breaks."""
    while True:
        yield from marker(output, OPEN)
        name = yield from _name(output)
        if name in output.tools and (yield from _pairs(output, name)):
            output.end()
        else:
            output.drop()


def _name(output: Output) -> Generator[None, str, str]:
    """Up to the end of the line, or to a tag, which is not read."""
    name = ""
    while len(name) <= MAX_NAME:
        char = yield
        if char == "<":
            output.unread()
            return name.strip()
        if char == "\n" and name.strip():
            return name.strip()
        name += char
    return ""


def _pairs(output: Output, name: str) -> Read:
    values, before = output.values(name), "{"
    output.start(name)
    while (tag := (yield from either(output, KEY, CLOSE))) == KEY:
        key = yield from taken(output, END_KEY, MAX_NAME)
        if key is None or not (yield from blanks_then(output, VALUE)):
            return False
        output.arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
        yield from _value(output, values.kinds(key), END_VALUE)
        before = ", "
    if tag is not None:
        output.arguments("{}" if before == "{" else "}")
    return tag is not None


def _value(output: Output, kinds: frozenset[str], *ends: str) -> Generator[None, str, None]:
    """A value up to one of its ends. A string is told as it comes; of others only the whole text says what they are.

    Where an end has a line break before it, the value has one too that is not of it.
    """
    seen, text, told = StopStrings(ends), "", kinds == STRING
    if told:
        output.arguments('"')
    if ends[0].startswith("\n"):
        char = yield
        if char != "\n":
            output.unread()
    parts: list[str] = []
    firsts = {end[0] for end in ends}
    while True:
        char = yield
        if not text and char not in firsts:
            parts.append(char) if not told else output.arguments(json.dumps(char, ensure_ascii=False)[1:-1])
            continue
        text += char
        found = seen.feed(char)
        cut = len(text) - (len(found[0]) if found else seen.held)
        if told:
            output.arguments(json.dumps(text[:cut], ensure_ascii=False)[1:-1])
        else:
            parts.append(text[:cut])
        text = text[cut:]
        if found:
            output.arguments('"' if told else as_json("".join(parts), kinds))
            return
