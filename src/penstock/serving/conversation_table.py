"""Conversations, in the database of a store. None goes by itself: where there is no room, what is new is refused."""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Sequence

import msgspec

from penstock.serving.database import Database, Part
from penstock.serving.errors import HTTPError, invalid
from penstock.serving.limits import (
    MAX_BODY_BYTES,
    MAX_CONVERSATION_BYTES,
    MAX_CONVERSATION_BYTES_IN_ALL,
    MAX_CONVERSATIONS,
    MAX_CONVERSATIONS_IN_ALL,
    MAX_MESSAGES,
)
from penstock.serving.response_items import Item, ItemList, in_full, page_of
from penstock.serving.room import Room, use, used

ON_DISK = Room(MAX_CONVERSATIONS, MAX_CONVERSATION_BYTES, MAX_CONVERSATIONS_IN_ALL, MAX_CONVERSATION_BYTES_IN_ALL)


class Conversation(msgspec.Struct, kw_only=True):
    """OpenAI's Conversation."""

    id: str
    created_at: int
    metadata: dict[str, str]
    object: str = "conversation"


class ConversationTable:
    """Everything here blocks, and what writes raises Unavailable: (store_unwritable)."""

    def __init__(self, database: Database, room: Room = ON_DISK) -> None:
        self._database, self._room = database, room

    def create(self, tenant: str, items: Sequence[Item], metadata: dict[str, str]) -> Conversation:
        """Raises HTTPError: (storage_full), (conversation_full)."""
        id, now = f"conv_{secrets.token_hex(16)}", int(time.time())
        with self._database.transaction() as db:
            row = (id, tenant, now, msgspec.json.encode(metadata).decode())
            db.execute("insert into conversation values (?, ?, ?, ?)", row)
            use(db, "conversation", tenant, 1, 0)
            _put(db, tenant, id, items)
            self._check_room(db, tenant, id)
        return Conversation(id=id, created_at=now, metadata=metadata)

    def get(self, tenant: str, id: str) -> Conversation:
        """Raises HTTPError: (conversation_not_found)."""
        row = self._database.one("select * from conversation where id = ? and tenant = ?", (id, tenant))
        if row is None:
            raise _not_found(id)
        metadata = msgspec.json.decode(row["metadata"])
        return Conversation(id=id, created_at=row["created_at"], metadata=metadata)

    def update(self, tenant: str, id: str, metadata: dict[str, str]) -> Conversation:
        """Raises HTTPError: (conversation_not_found)."""
        with self._database.transaction() as db:
            values = (msgspec.json.encode(metadata).decode(), id, tenant)
            db.execute("update conversation set metadata = ? where id = ? and tenant = ?", values)
        return self.get(tenant, id)

    def delete(self, tenant: str, id: str) -> None:
        """With its items. Raises HTTPError: (conversation_not_found)."""
        with self._database.transaction() as db:
            _check_owner(db, tenant, id)
            _, size = _extent(db, id)
            db.execute("delete from conversation where id = ?", (id,))
            use(db, "conversation", tenant, -1, -size)

    def add(self, tenant: str, id: str, items: Sequence[Item]) -> list[Item]:
        """Raises HTTPError: (conversation_not_found), (conversation_full), (storage_full)."""
        with self._database.transaction() as db:
            _check_owner(db, tenant, id)
            added = _put(db, tenant, id, items)
            self._check_room(db, tenant, id)
        return added

    def begin_turn(self, tenant: str, id: str, given: Sequence[Item]) -> list[Item]:
        """All items so far, the first one first, if there is room for those of a request.

        Raises HTTPError: (conversation_not_found), (conversation_full), (storage_full).
        """
        size = sum([len(msgspec.json.encode(item)) for item in given])
        with self._database.transaction() as db:
            _check_owner(db, tenant, id, "conversation")
            self._check_room(db, tenant, id, len(given), size)
            found = db.execute("select body from item where conversation = ? order by number", (id,)).fetchall()
        return [msgspec.json.decode(body) for [body] in found]

    def end_turn(self, tenant: str, id: str, items: Sequence[Item]) -> bool:
        """Adds what a response was given and its output, room or not, since it has been computed.

        False if the conversation was deleted meanwhile.
        """
        with self._database.transaction() as db:
            if db.execute("select 1 from conversation where id = ?", (id,)).fetchone() is None:
                return False
            _put(db, tenant, id, items)
        return True

    def page(self, tenant: str, id: str, part: Part) -> ItemList:
        """Raises HTTPError: (conversation_not_found); (invalid_parameter) ``after`` names no item of it."""
        self.get(tenant, id)
        where, values = "conversation = ?", [id]
        if part.after is not None:
            found = "select number from item where id = ? and conversation = ?"
            if self._database.one(found, (part.after, id)) is None:
                raise invalid("after", "it names no item of this conversation")
            where += f" and number {'>' if part.ascending else '<'} ({found})"
            values += [part.after, id]
        order = "asc" if part.ascending else "desc"
        query = f"select body from item where {where} order by number {order} limit {part.limit + 1:d}"
        items = [msgspec.json.decode(row["body"]) for row in self._database.all(query, tuple(values))]
        return page_of(items[: part.limit], more=len(items) > part.limit)

    def item(self, tenant: str, id: str, item: str) -> Item:
        """Raises HTTPError: (conversation_not_found), (item_not_found)."""
        self.get(tenant, id)
        row = self._database.one("select body from item where id = ? and conversation = ?", (item, id))
        if row is None:
            raise _no_item(item)
        found: Item = msgspec.json.decode(row["body"])
        return found

    def referred(self, tenant: str, item: str) -> Item | None:
        """The item of that id in whichever conversation of the tenant."""
        query = (
            "select body from item join conversation on conversation.id = item.conversation "
            "where item.id = ? and tenant = ? limit 1"
        )
        row = self._database.one(query, (item, tenant))
        return None if row is None else msgspec.json.decode(row["body"])

    def delete_item(self, tenant: str, id: str, item: str) -> Conversation:
        """Raises HTTPError: (conversation_not_found), (item_not_found)."""
        with self._database.transaction() as db:
            _check_owner(db, tenant, id)
            query = "delete from item where id = ? and conversation = ? returning length(body)"
            gone = db.execute(query, (item, id)).fetchall()
            if not gone:
                raise _no_item(item)
            use(db, "conversation", tenant, 0, -gone[0][0])
        return self.get(tenant, id)

    def _check_room(self, db: sqlite3.Connection, tenant: str, id: str, count: int = 0, size: int = 0) -> None:
        """For as many more items, and bytes."""
        items, bytes = _extent(db, id)
        if items + count > MAX_MESSAGES or bytes + size > MAX_BODY_BYTES:
            raise HTTPError(
                "conversation_full",
                "There is no room in this conversation",
                why=f"{items + count} items of {bytes + size} bytes; at most {MAX_MESSAGES} of {MAX_BODY_BYTES}",
                fix="delete some of its items, or begin another",
                status=413,
            )
        room, own, all = self._room, used(db, "conversation", tenant), used(db, "conversation")
        if own[0] > room.count or own[1] + size > room.bytes:
            raise _storage_full("a client", own, size, room.count, room.bytes)
        if all[0] > room.count_in_all or all[1] + size > room.bytes_in_all:
            raise _storage_full("all clients", all, size, room.count_in_all, room.bytes_in_all)


def _put(db: sqlite3.Connection, tenant: str, id: str, items: Sequence[Item]) -> list[Item]:
    """Puts items at its end; as they are there, each with an id that no other item of it has."""
    added, size = [], 0
    for item in items:
        shown = in_full(item, secrets.token_hex(16))
        if db.execute("select 1 from item where id = ? and conversation = ?", (shown["id"], id)).fetchone():
            shown = in_full({**item, "id": None}, secrets.token_hex(16))
        body = msgspec.json.encode(shown)
        db.execute("insert into item (conversation, id, body) values (?, ?, ?)", (id, shown["id"], body))
        size += len(body)
        added.append(shown)
    use(db, "conversation", tenant, 0, size)
    return added


def _extent(db: sqlite3.Connection, id: str) -> tuple[int, int]:
    """How many items it has, and their bytes."""
    query = "select count(*), coalesce(sum(length(body)), 0) from item where conversation = ?"
    count, size = db.execute(query, (id,)).fetchone()
    return count, size


def _check_owner(db: sqlite3.Connection, tenant: str, id: str, param: str | None = None) -> None:
    if db.execute("select 1 from conversation where id = ? and tenant = ?", (id, tenant)).fetchone() is None:
        raise _not_found(id, param)


def _not_found(id: str, param: str | None = None) -> HTTPError:
    return HTTPError(
        "conversation_not_found",
        f"There is no conversation {id[:64]!r}",
        why="it was not begun here, or was deleted",
        fix="begin one with POST /v1/conversations",
        param=param,
        status=404,
    )


def _no_item(id: str) -> HTTPError:
    return HTTPError(
        "item_not_found",
        f"There is no item {id[:64]!r} in this conversation",
        fix="see GET /v1/conversations/ID/items",
        status=404,
    )


def _storage_full(whose: str, used: tuple[int, int], more: int, count: int, bytes: int) -> HTTPError:
    return HTTPError(
        "storage_full",
        "There is no room for more conversations",
        why=f"{used[0]} of {used[1] + more} bytes; {whose} may have {count} of {bytes}",
        fix="delete conversations that are no longer needed",
        status=413,
    )
