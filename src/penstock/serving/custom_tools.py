"""Tools whose input is any text, of chat and of responses: to the model functions of one argument."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from penstock.serving.errors import invalid
from penstock.serving.tools import CustomSpec, ToolSpec

_INPUT = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}


def custom_spec(name: Any, description: Any, form: Any, place: str) -> CustomSpec:
    """A function of one text, held to that, and to a grammar if it has one, of which the model is told, too.

    Raises:
        HTTPError: (invalid_parameter) of its format.
        msgspec.ValidationError: the name or the description is no text.
    """
    told, text = description, None
    match form:
        case None | {"type": "text"}:
            pass
        case {"type": "grammar", "syntax": "lark" | "regex" as syntax, "definition": str(definition)} | {
            "type": "grammar",
            "grammar": {"syntax": "lark" | "regex" as syntax, "definition": str(definition)},
        }:
            text = (syntax, definition)
            told = f"{told or ''}\n\nThe input follows this {syntax} grammar:\n{definition}".strip()
        case _:
            why = "it must be of type text, or of type grammar with its syntax, lark or regex, and its definition"
            raise invalid(f"{place}.format", why)
    return msgspec.convert(
        {"name": name, "description": told, "parameters": _INPUT, "strict": True, "text": text}, CustomSpec
    )


def as_functions(tools: Sequence[ToolSpec] | None) -> list[ToolSpec] | None:
    """Those of chat, custom ones as functions. Raises HTTPError: (invalid_parameter)."""
    return None if tools is None else [_as_function(tool, f"tools[{i}].custom") for i, tool in enumerate(tools)]


def _as_function(tool: ToolSpec, place: str) -> ToolSpec:
    if tool.type != "custom":
        return tool
    if tool.custom is None:
        raise invalid(place, "it is missing")
    function = custom_spec(tool.custom.name, tool.custom.description, tool.custom.format, place)
    return ToolSpec(type="function", function=function)


def custom_names(tools: Sequence[ToolSpec] | None) -> frozenset[str]:
    """Of tools of chat."""
    return frozenset(tool.custom.name for tool in tools or () if tool.type == "custom" and tool.custom is not None)


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


def text_of(arguments: str) -> str:
    """The text in arguments that are all there."""
    given = InputText()
    given.feed(arguments)
    given.finish()
    return given.text
