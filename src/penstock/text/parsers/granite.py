"""Granite 3: <|tool_call|>[{"name": ..., "arguments": ...}, ...]; 3.0 and some fine-tunes leave out the bars."""

from __future__ import annotations

from penstock.spec.tools import CallShape
from penstock.text.parsers.listed import list_or_row
from penstock.text.parsers.output import Output, Steps
from penstock.text.parsers.steps import marker

TAG = "<|tool_call|>"

SHAPE = CallShape(
    trigger=TAG, begin='{{"name": {name}, "arguments": ', end="}", between=", ", first=TAG + "[", last="]"
)


def granite(output: Output) -> Steps:
    while True:
        yield from marker(output, TAG, "<tool_call>")
        yield from list_or_row(output, bare=False)
