"""Llama 3.1 to 3.3: JSON with "name" and "parameters" at the start of a text, or after <|python_tag|>."""

from __future__ import annotations

from penstock.spec.tools import CallShape
from penstock.text.parsers.listed import list_or_row
from penstock.text.parsers.output import Output, Steps
from penstock.text.parsers.steps import marker

TAG = "<|python_tag|>"

SHAPE = CallShape(trigger=None, begin='{{"name": {name}, "parameters": ', end="}", between="; ", first="", last="")


def llama3(output: Output) -> Steps:
    yield from list_or_row(output, bare=True)
    while True:
        yield from marker(output, TAG)
        yield from list_or_row(output, bare=False)
