"""Hermes' format, which Qwen 2.5 and 3, Granite 4, SmolLM3 and others took over: <tool_call>{...}</tool_call>."""

from __future__ import annotations

from penstock.spec.tools import CallShape
from penstock.text.parsers.output import Output, Steps
from penstock.text.parsers.steps import call, marker, up_to

OPEN, CLOSE = "<tool_call>", "</tool_call>"

SHAPE = CallShape(
    trigger=OPEN, begin=OPEN + '\n{{"name": {name}, "arguments": ', end="}\n" + CLOSE, between="\n", first="", last=""
)


def hermes(output: Output) -> Steps:
    while True:
        yield from marker(output, OPEN)
        if (yield from call(output)) and (yield from up_to(output, CLOSE)):
            output.end()
        else:
            output.drop()
