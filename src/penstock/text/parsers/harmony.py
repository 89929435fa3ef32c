"""gpt-oss (OpenAI's "harmony"): messages, each with a channel and perhaps a recipient in its head.

Thoughts are in the channel ``analysis``, what is said to the user in ``final`` or, beside calls, in ``commentary``; a
message to ``functions.name`` is a call. The prompt ends within the first head.
"""

from __future__ import annotations

import re
from collections.abc import Generator

from penstock.spec.tools import CallShape
from penstock.text.completion import StopStrings
from penstock.text.parsers.output import Output, Steps
from penstock.text.parsers.steps import Read, arguments, either_or_end, exactly, marker, nonblank, taken

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
MARKS = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN)
ANALYSIS = CHANNEL + "analysis" + MESSAGE
FINAL = CHANNEL + "final" + MESSAGE
NEXT = END + START + "assistant"
MAX_HEAD = 256

SHAPE = CallShape(
    trigger=None,
    begin=CHANNEL + "commentary to=functions.{bare_name} " + CONSTRAIN + "json" + MESSAGE,
    end="",
    between=CALL + START + "assistant",
    first="",
    last="",
    says=FINAL,
)

_HEAD = re.compile(
    r"(?:<\|start\|>assistant)?\s*(?:to=(?P<early>[^\s<]+)\s*)?<\|channel\|>(?P<channel>analysis|commentary|final)"
    r"(?:\s+to=(?P<late>[^\s<]+))?\s*(?:(?:<\|constrain\|>)?\w+\s*)?<\|message\|>"
)


def harmony(output: Output) -> Steps:
    inside = False
    head = yield from _recipient(output)
    while True:
        if not head:
            mark = yield from marker(output, START, CHANNEL, END, CALL, RETURN)
            if mark not in (START, CHANNEL):
                output.forget() if inside else output.release()
                inside = False
                continue
            head = mark
        rest = yield from taken(output, MESSAGE, MAX_HEAD)
        found = _HEAD.fullmatch(f"{head}{rest}{MESSAGE}")
        head, inside = "", False
        if rest is None or found is None:
            output.drop()
        elif recipient := found["early"] or found["late"]:
            name = recipient.removeprefix("functions.")
            if name != recipient and name in output.tools and (yield from _call(output, name)):
                output.end()
            else:
                output.drop()
        else:
            output.forget()
            inside = True
            if found["channel"] == "analysis":
                head = yield from _thoughts(output)
                inside = False


def _recipient(output: Output) -> Generator[None, str, str]:
    """The start of a head that names its recipient before its channel, where the prompt has begun it."""
    if (yield from nonblank(output)) == "t" and (yield from exactly(output, "o=")):
        return "to="
    if not output.again:
        output.unread()
    return ""


def _call(output: Output, name: str) -> Read:
    if not (yield from arguments(output, name)):
        return False
    return (yield from either_or_end(output, CALL, END, RETURN)) is not None


def _thoughts(output: Output) -> Generator[None, str, str]:
    """Tells thoughts up to their end; the mark of a message that begins without one is returned."""
    seen = StopStrings((END, RETURN, CALL, START))
    output.thinking = True
    while True:
        char = yield
        found = seen.feed(char)
        output.think(keep=len(found[0]) if found else seen.held)
        if found:
            output.thinking = False
            if found[0] == START:
                return START
            output.forget()
            return ""
