"""What answers at /v1/conversations, and of the responses that are kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from penstock.serving.context import context_of
from penstock.serving.conversation_table import Conversation, ConversationTable
from penstock.serving.database import Part
from penstock.serving.edge import as_json, body_of, off_loop, parse
from penstock.serving.errors import invalid
from penstock.serving.files import PageQuery, part_of
from penstock.serving.gate import current
from penstock.serving.kept import Kept
from penstock.serving.limits import INLINE_BYTES, MAX_ITEMS
from penstock.serving.long_ids import refuse_many_values
from penstock.serving.operations import operation
from penstock.serving.response_inputs import resolved
from penstock.serving.response_items import DeletedResponse, Item, ItemList, ResponseObject, messages_from, page_of
from penstock.serving.response_schemas import check_include
from penstock.serving.schemas import Metadata

SHOWN = 20
"""Items in a list where its query does not say, as in OpenAI's API."""

Items = Annotated[list[Item], Meta(max_length=MAX_ITEMS)]
T = TypeVar("T")


class ConversationRequest(msgspec.Struct, kw_only=True):
    """POST /v1/conversations"""

    items: Items | None = None
    metadata: Metadata | None = None


class MetadataRequest(msgspec.Struct, kw_only=True):
    """POST /v1/conversations/ID; null for none."""

    metadata: Metadata | None


class ItemsRequest(msgspec.Struct, kw_only=True):
    """POST /v1/conversations/ID/items"""

    items: Items


class IncludeQuery(msgspec.Struct, kw_only=True):
    include: list[str] | None = None


class ItemQuery(PageQuery, kw_only=True):
    include: list[str] | None = None


class DeletedConversation(msgspec.Struct):
    id: str
    object: str = "conversation.deleted"
    deleted: bool = True


@dataclass(frozen=True, slots=True)
class _Asked:
    """Whose request it is, and the ids it names."""

    kept: Kept
    table: ConversationTable
    tenant: str
    id: str
    item: str

    async def done(self, work: Callable[..., T], *more: object) -> T:
        """In a thread, of this conversation."""
        return await asyncio.to_thread(work, self.tenant, self.id, *more)


async def _asked(request: Request) -> _Asked:
    """Raises OverLimit, Unavailable: as of files, what writes is counted, and is refused in a drain."""
    context, caller, names = context_of(request), current.get(), request.path_params
    if request.method == "POST":
        context.admit(None)
        caller.enter()
    query = request.query_params
    check_include([*query.getlist("include"), *query.getlist("include[]")])
    table = await context.kept.conversations()
    return _Asked(context.kept, table, caller.tenant, names.get("conversation", ""), names.get("item", ""))


async def _body(request: Request, shape: type[T]) -> T:
    async with body_of(request) as body:
        return await off_loop(len(body), partial(_parsed, body, shape))


def _parsed(body: bytes, shape: type[T]) -> T:
    if len(body) > INLINE_BYTES:
        refuse_many_values(body, b":")
        refuse_many_values(body, b",")
    return parse(body, shape)


async def _items(given: list[Item], kept: Kept) -> list[Item]:
    """Those that a response can go on from. Raises HTTPError: as ``messages_from``, ``resolved``."""
    items = await resolved(given, kept, "items")
    await asyncio.to_thread(messages_from, items, None, "items")
    return items


async def _told(work: Callable[[], object]) -> Response:
    """Of megabytes, say: looked up and written in a thread."""
    return await asyncio.to_thread(lambda: as_json(work()))


@operation(
    "Begin a conversation.",
    takes=ConversationRequest,
    gives=Conversation,
    example={"items": [{"role": "user", "content": "Once upon a time"}], "metadata": {"topic": "tales"}},
)
async def conversations_of_all(request: Request) -> Response:
    asked = await _asked(request)
    wanted = await _body(request, ConversationRequest)
    items = await _items(wanted.items or [], asked.kept)
    return as_json(await asyncio.to_thread(asked.table.create, asked.tenant, items, wanted.metadata or {}))


@operation("Describe a conversation.", gives=Conversation)
@operation("Change a conversation's metadata.", takes=MetadataRequest, gives=Conversation)
@operation("Delete a conversation with its items.", method="DELETE", gives=DeletedConversation)
async def one_conversation(request: Request) -> Response:
    asked = await _asked(request)
    if request.method == "POST":
        wanted = await _body(request, MetadataRequest)
        return as_json(await asked.done(asked.table.update, wanted.metadata or {}))
    if request.method == "DELETE":
        asked.kept.check_free(asked.id)
        await asked.done(asked.table.delete)
        return as_json(DeletedConversation(asked.id))
    return as_json(await asked.done(asked.table.get))


@operation("List the items of a conversation, the latest first.", query=ItemQuery, gives=ItemList)
@operation("Add items to a conversation.", takes=ItemsRequest, query=IncludeQuery, gives=ItemList)
async def conversation_items(request: Request) -> Response:
    asked = await _asked(request)
    if request.method == "POST":
        wanted = await _body(request, ItemsRequest)
        items = await _items(wanted.items, asked.kept)
        asked.kept.check_free(asked.id)
        return as_json(page_of(await asked.done(asked.table.add, items), more=False))
    part = part_of(request.query_params, SHOWN)
    return await _told(partial(asked.table.page, asked.tenant, asked.id, part))


@operation("Describe an item of a conversation.", query=IncludeQuery, gives=Item)
@operation("Delete an item of a conversation.", method="DELETE", gives=Conversation)
async def one_item(request: Request) -> Response:
    asked = await _asked(request)
    if request.method == "DELETE":
        asked.kept.check_free(asked.id)
        return as_json(await asked.done(asked.table.delete_item, asked.item))
    return await _told(partial(asked.table.item, asked.tenant, asked.id, asked.item))


@operation("A response that was stored.", gives=ResponseObject)
@operation("Forget a response.", method="DELETE", gives=DeletedResponse)
async def one_response(request: Request) -> Response:
    table, id = await context_of(request).kept.responses(), request.path_params["response"]
    if request.method == "DELETE":
        await asyncio.to_thread(table.delete, current.get().tenant, id)
        return as_json(DeletedResponse(id))
    return await _told(partial(table.response, current.get().tenant, id))


@operation("What a stored response was given, the latest first.", query=PageQuery, gives=ItemList)
async def response_items(request: Request) -> Response:
    table, id = await context_of(request).kept.responses(), request.path_params["response"]
    part = part_of(request.query_params, SHOWN)
    items = await asyncio.to_thread(table.given, current.get().tenant, id)
    return as_json(_page(items if part.ascending else items[::-1], part))


def _page(items: list[Item], part: Part) -> ItemList:
    """Raises HTTPError: (invalid_parameter) ``after`` names none of them."""
    ids = [item["id"] for item in items]
    if part.after is not None and part.after not in ids:
        raise invalid("after", "it names no item of this response")
    start = 0 if part.after is None else ids.index(part.after) + 1
    return page_of(items[start : start + part.limit], more=start + part.limit < len(items))
