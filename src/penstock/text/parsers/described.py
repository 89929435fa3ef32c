"""Tools for chat templates that have no place for them: told in a system message, calls and results as plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.spec.tools import CallShape

Message = Mapping[str, Any]


def described(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], shape: CallShape) -> Sequence[Message]:
    """The same conversation without anything that only a template for tools would show.

    Args:
        tools: as OpenAI's API has them, perhaps none.
        shape: how calls are written, told and shown.
    """
    if not tools and not any(
        isinstance(m, Mapping) and (m.get("tool_calls") or m.get("role") == "tool") for m in messages
    ):
        return messages
    names: dict[Any, Any] = {}
    plain: list[Message] = []
    for message in messages:
        if not isinstance(message, Mapping):  # the template's to refuse
            return messages
        calls = [call.get("function", {}) | {"id": call.get("id")} for call in message.get("tool_calls") or ()]
        names |= {call["id"]: call.get("name") for call in calls}
        if message.get("role") == "tool":
            told = f"{names.get(message.get('tool_call_id')) or 'The function'} returned: {message.get('content')}"
            if plain and plain[-1].get("answers"):
                told = f"{plain.pop()['content']}\n{told}"
            plain.append({"role": "user", "content": told, "answers": True})
        elif calls:
            content = message.get("content")
            written = write_calls(shape, [(call.get("name"), call.get("arguments")) for call in calls])
            plain.append({"role": message["role"], "content": f"{content}\n{written}" if content else written})
        else:
            plain.append(message)
    plain = [{key: value for key, value in message.items() if key != "answers"} for message in plain]
    return _with_system(plain, _instruction(tools, shape)) if tools else plain


def write_calls(shape: CallShape, calls: Sequence[tuple[Any, Any]]) -> str:
    """Calls as the model writes them, from names and arguments, as JSON text or as an object."""
    written = [f"{_begin(shape, str(name))}{_written(shape, arguments)}{shape.end}" for name, arguments in calls]
    return f"{shape.first}{shape.between.join(written)}{shape.last}"


def _written(shape: CallShape, arguments: Any) -> str:
    """Arguments as one JSON object, or each on its own."""
    text = _json(arguments)
    if (field := shape.field) is None:
        return text
    try:
        given = json.loads(text)
    except ValueError:
        given = None
    if not isinstance(given, dict):  # nothing of the kind was ever called
        return text
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in given.items()
    }
    return "".join(f"{field.begin.format(key=key)}{value}{field.end}" for key, value in texts.items())


def _json(arguments: Any) -> str:
    return arguments or "{}" if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)


def _begin(shape: CallShape, name: str) -> str:
    return shape.begin.format(name=json.dumps(name, ensure_ascii=False), bare_name=name)


def _instruction(tools: Sequence[Mapping[str, Any]], shape: CallShape) -> str:
    functions = "\n".join(json.dumps(tool.get("function"), ensure_ascii=False) for tool in tools)
    return (
        f"You can call these functions:\n{functions}\n"
        "To call one, answer with nothing but its name and arguments in this form:\n"
        + write_calls(shape, [("function-name", '{"argument": "value"}')])
    )


def _with_system(messages: list[Message], text: str) -> list[Message]:
    if messages and messages[0].get("role") in ("system", "developer") and isinstance(messages[0].get("content"), str):
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
