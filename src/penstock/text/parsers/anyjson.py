"""Calls as plain JSON at the start of a text, with nothing around them: any model can be told to write that."""

from __future__ import annotations

from penstock.spec.tools import CallShape
from penstock.text.parsers.listed import list_or_row
from penstock.text.parsers.output import Output, Steps

SHAPE = CallShape(trigger=None, begin='{{"name": {name}, "arguments": ', end="}", between="\n", first="", last="")


def any_json(output: Output) -> Steps:
    yield from list_or_row(output, bare=True)
    output.plain = ""  # after anything else there is only content
    while True:
        yield
        output.release()
