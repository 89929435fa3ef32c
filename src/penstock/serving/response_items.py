"""Items of OpenAI's Responses API, as messages of a chat."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypedDict

import msgspec

from penstock.serving.custom_tools import arguments_of
from penstock.serving.errors import invalid, unsupported
from penstock.serving.limits import MAX_MESSAGES
from penstock.serving.schemas import ROLES

Item = dict[str, Any]


class ResponseObject(TypedDict):
    """OpenAI's Response."""

    id: str
    object: str
    created_at: int
    status: str
    conversation: dict[str, str] | None
    error: None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: Item
    service_tier: str
    store: bool
    temperature: float
    text: Item
    tool_choice: str | Item
    tools: list[Item]
    top_p: float
    truncation: str
    usage: Item | None
    user: str | None


class ResponseEvent(TypedDict):
    """Its ``type`` is the event's name too, and says what else is in it."""

    type: str
    sequence_number: int


class DeletedResponse(msgspec.Struct):
    id: str
    object: str = "response"
    deleted: bool = True


class ItemList(msgspec.Struct, kw_only=True):
    """Items that a response was given, or of a conversation."""

    data: list[Item]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: str = "list"


def page_of(items: list[Item], *, more: bool) -> ItemList:
    first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
    return ItemList(data=items, has_more=more, first_id=first, last_id=last)


_VERBOSITY = (None, "low", "medium", "high")
"""A wish that models here do not read: no answer is wrong for its length."""
_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def as_items(given: str | list[Item]) -> list[Item]:
    return [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given


_OWN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PREFIXES = {"message": "msg", "function_call": "fc", "custom_tool_call": "ctc", "reasoning": "rs"}


def in_full(item: Item, name: str) -> Item:
    """As lists show it: with a type, a status, an id, and its text in parts. ``name``: of the id, if it has none."""
    kind, content, given = item.get("type") or "message", item.get("content"), item.get("id")
    shown = {"status": "completed", **item, "type": kind}
    if not (isinstance(given, str) and _OWN_ID.fullmatch(given)):
        shown["id"] = f"{_PREFIXES.get(kind, 'item')}_{name}"
    if kind == "message" and isinstance(content, str):
        said = item.get("role") == "assistant"
        part = {"type": "output_text", "text": content, "annotations": []}
        shown["content"] = [part if said else {"type": "input_text", "text": content}]
    return shown


def messages_from(items: Sequence[Item], instructions: str | None, field: str = "input") -> list[dict[str, Any]]:
    """Messages as templates read them: thoughts, text and calls that follow each other are one turn of the assistant.

    Args:
        field: of the request, which has the items.

    Raises:
        HTTPError: invalid_parameter, unsupported_parameter; the message names the item.
    """
    if len(items) > MAX_MESSAGES:
        raise invalid(field, f"the conversation has {len(items)} items, at most {MAX_MESSAGES} are allowed")
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    turn: dict[str, Any] | None = None
    for i, item in enumerate(items):
        place = f"{field}[{i}]"
        match item:
            case {"type": "function_call" | "custom_tool_call", "status": "incomplete"}:  # its text is a message
                continue
            case {"type": "function_call", "call_id": str(call), "name": str(name), "arguments": str(arguments)}:
                _call(turn := _turn(messages, turn), call, name, arguments)
            case {"type": "custom_tool_call", "call_id": str(call), "name": str(name), "input": str(text)}:
                _call(turn := _turn(messages, turn), call, name, arguments_of(text))
            case {"type": "reasoning"}:
                turn = _turn(messages, None)
                turn["reasoning_content"] = _text(item.get("content") or item.get("summary") or [], place)
            case {"type": "function_call_output" | "custom_tool_call_output", "call_id": str(call), "output": output}:
                messages.append({"role": "tool", "tool_call_id": call, "content": _text(output, place)})
                turn = None
            case {"role": "assistant", "content": content} if item.get("type", "message") == "message":
                turn = _turn(messages, turn if turn and not turn["content"] and "tool_calls" not in turn else None)
                turn["content"] = _text(content, place)
            case {"role": role, "content": content} if item.get("type", "message") == "message":
                if role not in ROLES:
                    raise invalid(f"{place}.role", f"it must be one of {', '.join(ROLES)}")
                messages.append({"role": role, "content": _text(content, place)})
                turn = None
            case _:
                what = "an item is a message, a function_call or custom_tool_call, the output of one, or reasoning"
                raise invalid(place, what)
    return messages


def _turn(messages: list[dict[str, Any]], turn: dict[str, Any] | None) -> dict[str, Any]:
    if turn is None:
        messages.append(turn := {"role": "assistant", "content": ""})
    return turn


def _call(turn: dict[str, Any], identifier: str, name: str, arguments: str) -> None:
    function = {"name": name, "arguments": arguments}
    turn.setdefault("tool_calls", []).append({"id": identifier, "type": "function", "function": function})


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{place}.content", "it must be text or a list of parts")
    texts = []
    for part in content:
        match part:
            case {"type": kind, "text": str(text)} if kind in _TEXTS:
                texts.append(text)
            case _:
                raise unsupported(f"{place}.content", what="Only text parts are supported by this server")
    return "\n".join(texts)


def format_from(text: Any) -> Any:
    """``text.format`` as chat's response_format. Raises HTTPError: (unsupported_parameter)."""
    match text:
        case None:
            return None
        case {"format": {"type": "json_schema", "schema": schema}}:
            return {"type": "json_schema", "json_schema": {"schema": schema}}
        case {"format": {"type": "text" | "json_object" as kind}}:
            return {"type": kind}
        case dict() if text.get("format") is None and text.get("verbosity") in _VERBOSITY:
            return None
    raise unsupported("text", what="text.format must be text, json_object or json_schema")
