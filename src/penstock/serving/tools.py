"""Tools of a request: what may be called, what must be, and the form that makes sure of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from penstock.serving.errors import HTTPError, invalid, unsupported
from penstock.serving.limits import MAX_TOOL_CHARS, MAX_TOOL_DEPTH, MAX_TOOLS
from penstock.spec import StructuredOutputs
from penstock.spec.ranges import extent
from penstock.spec.tools import CallShape, Tool
from penstock.text.parsers import Formats, ThoughtTags

_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")


class FunctionSpec(msgspec.Struct, kw_only=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class CustomSpec(FunctionSpec, kw_only=True):
    """Of one text: ``text`` as of ``spec.tools.Tool``. No request has this shape."""

    text: tuple[str, str] | None = None


class CustomTool(msgspec.Struct, kw_only=True):
    """A tool whose input is any text, or one of a grammar."""

    name: str
    description: str | None = None
    format: dict[str, Any] | None = None


class ToolSpec(msgspec.Struct, kw_only=True):
    type: str
    function: FunctionSpec | None = None
    custom: CustomTool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a request says about tools.

    Attributes:
        told: all of them, as chat templates read them.
        tools: those that may be called.
        forced: at least one call must come, and nothing else.
        single: no more than one may.
    """

    told: tuple[dict[str, Any], ...] = ()
    tools: tuple[Tool, ...] = ()
    forced: bool = False
    single: bool = False

    @property
    def schemas(self) -> dict[str, str]:
        """Of the arguments of what may be called, by name."""
        return {tool.name: tool.parameters for tool in self.tools}

    def form(self, formats: Formats, wanted: StructuredOutputs | None, *, opened: bool) -> StructuredOutputs | None:
        """What the text must be: ``wanted`` without tools; else what keeps calls to their schemas, None if nothing.

        Args:
            wanted: the form of an answer that calls nothing.
            opened: the text starts within thoughts.

        Raises:
            HTTPError: (unsupported_parameter) ``wanted`` is no JSON; calls of the model cannot be read at all.
            InvalidRequest: as StructuredOutputs.
        """
        if not self.tools:
            return wanted
        if formats.calls is None:
            raise unsupported("tools", what="The format in which this model writes calls of tools is not known here")
        if not (self.forced or self.single or wanted or any(tool.strict for tool in self.tools)):
            return None
        shape, tags = formats.calls.shape, formats.thoughts
        form: dict[str, Any] = {
            "structures": [self._structure(tool, shape) for tool in self.tools],
            "triggers": [shape.trigger] if shape.trigger else [],
            "first": shape.first,
            "between": shape.between,
            "last": shape.last,
            "says": shape.says,
            "at_least": int(self.forced),
        }
        if self.single:
            form["at_most"] = 1
        if tags is not None:
            form["thoughts"] = _thoughts(tags, opened=opened)
        if wanted is not None and not self.forced:
            if wanted.kind not in _JSON:
                raise unsupported("tools", what="tools go together with forms of JSON only")
            form["answer"] = _answer(wanted)
        return StructuredOutputs(structural_tag=form)

    def _structure(self, tool: Tool, shape: CallShape) -> dict[str, Any]:
        exact = self.forced or tool.strict
        begin = shape.begin.format(name=json.dumps(tool.name), bare_name=tool.name)
        if tool.text is not None:
            return _held_text(*tool.text, begin, shape)
        structure = {
            "begin": begin,
            "schema": json.loads(tool.parameters) if exact else {"type": "object"},
            "end": shape.end,
        }
        return structure if shape.field is None else structure | {"field": [shape.field.begin, shape.field.end]}


def after_thoughts(
    wanted: StructuredOutputs, formats: Formats, *, opened: bool, headed: bool = False
) -> StructuredOutputs:
    """What a text must be whose answer is JSON, where the model is thinking already or each message has a head: the
    thoughts are free. Elsewhere, and of other forms, it is ``wanted`` itself, from the start.

    Args:
        opened: the text starts within thoughts.
        headed: it goes on with an answer whose head is there.
    """
    tags, calls = formats.thoughts, formats.calls
    if wanted.kind not in _JSON or tags is None:
        return wanted
    if not (opened or (tags.channels and not headed)):
        return wanted
    says = calls.shape.says if calls is not None and tags.channels else ""
    form = {"structures": [], "thoughts": _thoughts(tags, opened=opened), "answer": _answer(wanted), "says": says}
    return StructuredOutputs(structural_tag=form)


def _held_text(kind: str, definition: str, begin: str, shape: CallShape) -> dict[str, Any]:
    if shape.field is None:
        return {"begin": begin + '{"input": "', kind: definition, "end": '"}' + shape.end}
    if kind == "lark":
        what = "This model writes calls in a format in which no input can be held to a grammar in Lark"
        raise HTTPError("unsupported_parameter", what, fix="describe it with a regular expression", param="tools")
    field = [shape.field.begin.replace("{key}", "input"), shape.field.end]
    return {"begin": begin, kind: definition, "end": shape.end, "field": field}


_JSON = ("json", "json_object")


def _answer(wanted: StructuredOutputs) -> Any:
    """Its schema."""
    return {"type": "object"} if wanted.json is None else json.loads(str(wanted.json))


def _thoughts(tags: ThoughtTags, *, opened: bool) -> dict[str, Any]:
    return {"start": tags.starts, "end": tags.ends, "opened": opened}


def offer_of(tools: Sequence[ToolSpec] | None, choice: Any, parallel: bool | None) -> Offer:
    """Checks what a request says in ``tools``, ``tool_choice`` and ``parallel_tool_calls``.

    Raises:
        HTTPError: invalid_parameter, unsupported_parameter; ``too_many_tools``, ``tools_too_large``.
    """
    functions = [_function(tool, f"tools[{i}]") for i, tool in enumerate(tools or ())]
    _check_size(functions)
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise invalid("tools", "two of them have the same name")
    mode, allowed = _choice(choice)
    for name in allowed or ():
        if name not in names:
            raise invalid("tool_choice", f"there is no tool named {name[:64]!r}")
    if mode == "required" and not functions:
        raise invalid("tool_choice", "there are no tools")
    if mode == "none" or not functions:
        return Offer()
    return Offer(
        told=tuple(_told(function) for function in functions),
        tools=tuple(_tool(function) for function in functions if allowed is None or function.name in allowed),
        forced=mode in ("required", "named"),
        single=mode == "named" or parallel is False,
    )


def _choice(choice: Any) -> tuple[str, list[str] | None]:
    """(none, auto, required or named; the names that may be called, None for all)."""
    match choice:
        case None:
            return "auto", None
        case "none" | "auto" | "required":
            return str(choice), None
        case {"type": "function", "function": {"name": str(name)}} | {"type": "custom", "custom": {"name": str(name)}}:
            return "named", [name]
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(tools)}}:
            return mode, [_allowed(tool) for tool in tools]
    raise invalid("tool_choice", "it must be none, auto, required, or name a tool")


def _allowed(tool: Any) -> str:
    match tool:
        case {"type": "function", "function": {"name": str(name)}} | {"type": "custom", "custom": {"name": str(name)}}:
            return name
    raise invalid("tool_choice", "allowed tools must be functions or custom")


def _function(tool: ToolSpec, place: str) -> FunctionSpec:
    if tool.type != "function":
        raise unsupported(f"{place}.type", what=f"Tools of type {tool.type[:64]!r} are not supported here")
    if tool.function is None:
        raise invalid(f"{place}.function", "it is missing")
    function = tool.function
    if not _NAME.fullmatch(function.name):
        kind = "custom" if isinstance(function, CustomSpec) else "function"
        raise invalid(f"{place}.{kind}.name", "it must be 1 to 128 letters, digits, _ and -")
    kind = (function.parameters or {}).get("type", "object")
    if kind != "object":
        raise invalid(f"{place}.function.parameters", 'arguments are an object, so its type must be "object"')
    return function


def _check_size(functions: Sequence[FunctionSpec]) -> None:
    if len(functions) > MAX_TOOLS:
        why = f"there are {len(functions)}, at most {MAX_TOOLS} are allowed"
        raise HTTPError(
            "too_many_tools", "The request has too many tools", why=why, fix="leave some out", param="tools"
        )
    texts = [msgspec.json.encode(function).decode() for function in functions]
    if (size := sum(map(len, texts))) > MAX_TOOL_CHARS:
        why = f"as JSON they have {size:,} characters, at most {MAX_TOOL_CHARS:,} are allowed"
        raise HTTPError(
            "tools_too_large", "The tools of the request are too large", why=why, fix="leave some out", param="tools"
        )
    for i, function in enumerate(functions):
        if 1 + extent(function.parameters, MAX_TOOL_CHARS)[0] > MAX_TOOL_DEPTH:
            why = f"at most {MAX_TOOL_DEPTH} brackets within brackets are allowed"
            what = f"tools[{i}] is nested too deeply"
            raise HTTPError("tools_too_large", what, why=why, fix="make it flatter", param=f"tools[{i}]")


def _told(function: FunctionSpec) -> dict[str, Any]:
    """Without ``strict``: it is for the server, and no model has learned to read it."""
    told: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        told["description"] = function.description
    return {"type": "function", "function": told | {"parameters": _schema(function)}}


def _tool(function: FunctionSpec) -> Tool:
    schema = _schema(function)
    if function.parameters is None:  # as in OpenAI's API: it has no arguments
        schema["additionalProperties"] = False
    text = function.text if isinstance(function, CustomSpec) else None
    parameters = json.dumps(schema, ensure_ascii=False)
    return Tool(name=function.name, parameters=parameters, strict=bool(function.strict), text=text)


def _schema(function: FunctionSpec) -> dict[str, Any]:
    return {"type": "object", **(function.parameters or {"properties": {}})}
