"""What a response is made from: items that are kept and those of its request, as much of them as fits."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from penstock.base import InvalidRequest, Unavailable
from penstock.serving.context import Context
from penstock.serving.conversation_table import ConversationTable
from penstock.serving.dialogue import template_variables
from penstock.serving.errors import invalid
from penstock.serving.gate import current
from penstock.serving.kept import Kept
from penstock.serving.response_items import Item, as_items, messages_from
from penstock.serving.response_schemas import Asked, conversation_of
from penstock.serving.response_table import ResponseTable
from penstock.serving.response_tools import choice_from, tools_from
from penstock.serving.tools import Offer, offer_of

Message = dict[str, Any]
_ID = re.compile(r"[a-z]+_(?P<response>[0-9a-f]{32})(?P<given>i?)(?P<index>\d{1,6})")


@dataclass(frozen=True, slots=True)
class Prompted:
    """What the model is asked.

    Attributes:
        before: items of the conversation so far.
        given: those of the request.
        messages: of both, as much as fits, and what the system says.
        variables: for the chat template.
    """

    before: list[Item]
    given: list[Item]
    messages: list[Message]
    offer: Offer
    variables: dict[str, Any]


async def prompted(request: Asked, context: Context, answer_tokens: int = 1) -> Prompted:
    """Args: answer_tokens: that are to be left room for, where the oldest messages may be left out.

    Raises HTTPError, InvalidRequest, and Unavailable: (store_in_use), (store_unusable).
    """
    engine = context.llm.engine
    given = await resolved(as_items([] if request.input is None else request.input), context.kept)
    before = await _before(request, context.kept, given)
    effort = (request.reasoning or {}).get("effort")
    variables = template_variables(engine.chat, None, effort, "reasoning.effort")
    offer = await asyncio.to_thread(_offer, request)
    messages = await asyncio.to_thread(messages_from, [*before, *given], request.instructions)
    if request.truncation == "auto":

        async def count(some: list[Message]) -> int:
            prompt = await context.llm.tokenize_chat(some, tools=offer.told, add_generation_prompt=True, **variables)
            return len(prompt["prompt_token_ids"])

        longest = engine.setup.limits.max_model_len
        messages = await fitting(messages, count, longest - min(answer_tokens, longest // 2))
    return Prompted(before, given, messages, offer, variables)


def _offer(request: Asked) -> Offer:
    return offer_of(tools_from(request.tools), choice_from(request.tool_choice), request.parallel_tool_calls)


async def _before(request: Asked, kept: Kept, given: list[Item]) -> list[Item]:
    """Of the response or the conversation that it goes on from."""
    tenant = current.get().tenant
    if (previous := request.previous_response_id) is not None:
        responses = await kept.responses()
        return (await asyncio.to_thread(responses.get, tenant, previous, "previous_response_id")).items
    if (id := conversation_of(request)) is not None:
        conversations = await kept.conversations()
        return await asyncio.to_thread(conversations.begin_turn, tenant, id, given)
    return []


async def resolved(items: list[Item], kept: Kept, field: str = "input") -> list[Item]:
    """The same, with what is only referred to in its place.

    Args:
        field: of the request, which has the items.

    Raises:
        HTTPError: (invalid_parameter) it is no item that is kept; (response_not_found) its response is kept no more.
    """
    if not any(map(_refers, items)):
        return items
    responses = await kept.responses()
    conversations: ConversationTable | None = None
    with suppress(Unavailable):  # then there are none
        conversations = await kept.conversations()
    found = _Referred(responses, conversations, current.get().tenant)
    return await asyncio.to_thread(found.in_place, items, field)


def _refers(item: Item) -> bool:
    return item.get("type") == "item_reference" or (item.get("type") is None and item.keys() <= {"id", "type"})


@dataclass(frozen=True, slots=True)
class _Referred:
    """Items that a tenant has had kept, by their ids. Everything here blocks."""

    responses: ResponseTable
    conversations: ConversationTable | None
    tenant: str

    def in_place(self, items: Sequence[Item], field: str) -> list[Item]:
        return [self._find(item.get("id"), f"{field}[{i}]") if _refers(item) else item for i, item in enumerate(items)]

    def _find(self, id: Any, place: str) -> Item:
        item: Item | None = None
        if isinstance(id, str) and self.conversations is not None:
            item = self.conversations.referred(self.tenant, id)
        if item is None and isinstance(id, str) and (found := _ID.fullmatch(id)):
            response, index = f"resp_{found['response']}", int(found["index"])
            item = self.responses.item(self.tenant, response, index, place, given=bool(found["given"]))
        if item is None or item["id"] != id:
            raise invalid(place, "it refers to no item of a response or conversation that is kept")
        return item


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
