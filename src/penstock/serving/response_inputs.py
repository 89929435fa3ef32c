"""What a response is made from: items that are kept, and as much of a conversation as fits."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from penstock.base import InvalidRequest
from penstock.serving.errors import invalid
from penstock.serving.files import part_of
from penstock.serving.response_items import Item, ItemList
from penstock.serving.response_store import ResponseStore, Stored

SHOWN = 20
"""Items in a list where its query does not say, as in OpenAI's API."""

Message = dict[str, Any]
_ID = re.compile(r"[a-z]+_(?P<response>[0-9a-f]{32})(?P<given>i?)(?P<index>\d{1,6})")
_PREFIXES = {"message": "msg", "function_call": "fc", "custom_tool_call": "ctc", "reasoning": "rs"}


def listed(stored: Stored) -> list[Item]:
    """The items that a response was given, each with an id, its text in parts."""
    return [_listed(stored, i) for i in range(len(stored.given))]


def _listed(stored: Stored, index: int) -> Item:
    item, name = stored.given[index], f"{stored.response['id'].partition('_')[2]}i{index}"
    kind, content, given = item.get("type") or "message", item.get("content"), item.get("id")
    shown = {"status": "completed", **item, "type": kind}
    shown["id"] = given if isinstance(given, str) else f"{_PREFIXES.get(kind, 'item')}_{name}"
    if kind == "message" and isinstance(content, str):
        said = item.get("role") == "assistant"
        part = {"type": "output_text", "text": content, "annotations": []}
        shown["content"] = [part if said else {"type": "input_text", "text": content}]
    return shown


def page(stored: Stored, query: Mapping[str, str]) -> ItemList:
    """Of what it was given, the latest first. Raises HTTPError: (invalid_parameter)."""
    part = part_of(query)
    limit = part.limit if "limit" in query else SHOWN
    items = listed(stored)
    if not part.ascending:
        items.reverse()
    ids = [item["id"] for item in items]
    if part.after is not None and part.after not in ids:
        raise invalid("after", "it names no item of this response")
    start = 0 if part.after is None else ids.index(part.after) + 1
    data = items[start : start + limit]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return ItemList(data=data, has_more=start + limit < len(items), first_id=first, last_id=last)


def resolved(items: Sequence[Item], store: ResponseStore) -> list[Item]:
    """The same, with what is only referred to in its place.

    Raises:
        HTTPError: (invalid_parameter) it is no item of a response that is kept; (response_not_found) its response is
            kept no more.
    """
    return [_referred(item.get("id"), f"input[{i}]", store) if _refers(item) else item for i, item in enumerate(items)]


def _refers(item: Item) -> bool:
    return item.get("type") == "item_reference" or (item.get("type") is None and item.keys() <= {"id", "type"})


def _referred(identifier: Any, place: str, store: ResponseStore) -> Item:
    if isinstance(identifier, str) and (found := _ID.fullmatch(identifier)):
        stored, index = store.get(f"resp_{found['response']}", place), int(found["index"])
        if index < len(stored.given if found["given"] else stored.response["output"]):
            item = _listed(stored, index) if found["given"] else stored.response["output"][index]
            if item["id"] == identifier:
                return item
    raise invalid(place, "it refers to no item of a response that is kept")


async def fitting(
    messages: list[Message], count: Callable[[list[Message]], Awaitable[int]], room: int
) -> list[Message]:
    """The latest messages that take at most ``room``, and what the system says. They begin with a user's, or where
    that would be too many with the assistant's, so that a call keeps its result. All of them if nothing would fit.

    Args:
        count: tokens of a conversation, and of a longer one more. Raises InvalidRequest.
    """

    async def fits(some: list[Message]) -> bool:
        try:
            return await count(some) <= room
        except InvalidRequest as error:
            if error.code != "prompt_too_long":
                raise
            return False

    if await fits(messages):
        return messages
    for roles in (("user",), ("user", "assistant")):
        starts = [i for i, message in enumerate(messages) if message["role"] in roles]
        low, high = 0, len(starts)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if await fits(_from(messages, starts[middle])) else (middle + 1, high)
        if low < len(starts):
            return _from(messages, starts[low])
    return messages


def _from(messages: Sequence[Message], start: int) -> list[Message]:
    return [each for i, each in enumerate(messages) if i >= start or each["role"] in ("system", "developer")]
