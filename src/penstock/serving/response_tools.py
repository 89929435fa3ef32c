"""Tools of OpenAI's Responses API, as tools of a chat: functions, and tools whose input is any text."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from penstock.serving.errors import invalid, unsupported
from penstock.serving.tools import CustomSpec, FunctionSpec, ToolSpec
from penstock.serving.unread_fields import NotedFields

Item = dict[str, Any]

_BUILT_IN = re.compile(
    r"(web_search|computer)\w*|file_search|code_interpreter|image_generation|mcp|tool_search|local_shell|shell"
)
"""Types of tools that OpenAI's servers run, or that only its own models know how to call."""
_INPUT = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
_log = logging.getLogger(__name__)
_left_out = NotedFields("a request offers tools that this server cannot run, which are left out")


def tools_from(tools: Sequence[Item] | None) -> list[ToolSpec]:
    """Of those that may be called here; what OpenAI would run is left out, and told to the operator.

    Raises:
        HTTPError: invalid_parameter, unsupported_parameter; the message names the tool.
    """
    found, left = [], []
    for i, tool in enumerate(tools or ()):
        kind = tool.get("type")
        if isinstance(kind, str) and _BUILT_IN.fullmatch(kind):
            left.append(kind)
            continue
        if kind not in ("function", "custom"):
            raise unsupported(f"tools[{i}].type", what="Only tools of type function and custom are supported here")
        try:
            function = msgspec.convert(tool, FunctionSpec) if kind == "function" else _custom(tool, f"tools[{i}]")
        except msgspec.ValidationError as error:
            raise invalid(f"tools[{i}]", str(error)[:200]) from None
        found.append(ToolSpec(type="function", function=function))
    if line := _left_out.line(left):
        _log.warning("%s", line)
    return found


def _custom(tool: Item, place: str) -> CustomSpec:
    """A function of one text, held to that, and to a grammar if it has one, of which the model is told, too."""
    told = tool.get("description")
    text: tuple[str, str] | None = None
    match tool.get("format"):
        case None | {"type": "text"}:
            pass
        case {"type": "grammar", "syntax": "lark" | "regex" as syntax, "definition": str(definition)}:
            text = (syntax, definition)
            told = f"{told or ''}\n\nThe input follows this {syntax} grammar:\n{definition}".strip()
        case _:
            why = "it must be of type text, or of type grammar with its syntax, lark or regex, and its definition"
            raise invalid(f"{place}.format", why)
    asked = {"name": tool.get("name"), "description": told, "parameters": _INPUT, "strict": True, "text": text}
    return msgspec.convert(asked, CustomSpec)


def custom_names(tools: Iterable[Item] | None) -> frozenset[str]:
    return frozenset(str(tool.get("name")) for tool in tools or () if tool.get("type") == "custom")


def choice_from(choice: Any) -> Any:
    """As chat has it."""
    match choice:
        case {"type": "function" | "custom", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
        case {"type": "allowed_tools", "mode": mode, "tools": list(tools)}:
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [choice_from(t) for t in tools]}}
    return choice


_HEAD = re.compile(r'\s*{\s*"input"\s*:\s*"')
_WHOLE = re.compile(
    r'(?:[^"\\]|\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}'
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*"
)
"""Characters of a JSON string that are all there."""


class InputText:
    """The text in the arguments of a call of a custom tool, as they come.

    Attributes:
        text: all of it so far.
    """

    def __init__(self) -> None:
        self.text = ""
        self._arguments = self._rest = ""
        self._inside = False

    def feed(self, arguments: str) -> str:
        """What is new of the text."""
        self._arguments += arguments
        self._rest += arguments
        if not self._inside and (head := _HEAD.match(self._rest)):
            self._inside, self._rest = True, self._rest[head.end() :]
        found = _WHOLE.match(self._rest) if self._inside else None
        if found is None or not found[0]:
            return ""
        self._rest = self._rest[found.end() :]
        new: str = json.loads(f'"{found[0]}"', strict=False)
        self.text += new
        return new

    def finish(self) -> str:
        """The rest of it. Arguments of another shape are the text themselves."""
        try:
            given = json.loads(self._arguments, strict=False).get("input")
        except (ValueError, RecursionError):  # such as a number that is too long for Python
            given = None
        whole = given if isinstance(given, str) else self._arguments
        whole = whole.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        new, self.text = whole.removeprefix(self.text), whole
        return new


def arguments_of(text: str) -> str:
    """Arguments that are such a text."""
    return json.dumps({"input": text}, ensure_ascii=False)
