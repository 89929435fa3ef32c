"""Tools of OpenAI's Responses API, as tools of a chat: functions, and tools whose input is any text."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from penstock.serving.custom_tools import custom_spec
from penstock.serving.errors import invalid, unsupported
from penstock.serving.tools import FunctionSpec, ToolSpec
from penstock.serving.unread_fields import NotedFields

Item = dict[str, Any]

_BUILT_IN = re.compile(
    r"(web_search|computer)\w*|file_search|code_interpreter|image_generation|mcp|tool_search|local_shell|shell|"
    r"apply_patch"
)
"""Types of tools that OpenAI's servers run, or that only its own models know how to call."""
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
            if kind == "function":
                function = msgspec.convert(tool, FunctionSpec)
            else:
                function = custom_spec(tool.get("name"), tool.get("description"), tool.get("format"), f"tools[{i}]")
        except msgspec.ValidationError as error:
            raise invalid(f"tools[{i}]", str(error)[:200]) from None
        found.append(ToolSpec(type="function", function=function))
    if line := _left_out.line(left):
        _log.warning("%s", line)
    return found


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
