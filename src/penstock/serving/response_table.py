"""Responses that were asked to be kept, and what led to them, in the database of a store: the oldest go first."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from penstock.serving.database import Database
from penstock.serving.errors import HTTPError
from penstock.serving.limits import (
    MAX_RESPONSE_BYTES,
    MAX_RESPONSE_BYTES_IN_ALL,
    MAX_RESPONSE_BYTES_IN_MEMORY,
    MAX_RESPONSES,
    MAX_RESPONSES_IN_ALL,
    MAX_RESPONSES_IN_MEMORY,
    RESPONSE_DAYS,
)
from penstock.serving.response_items import Item, ResponseObject, in_full
from penstock.serving.room import Room, use, used

ON_DISK = Room(MAX_RESPONSES, MAX_RESPONSE_BYTES, MAX_RESPONSES_IN_ALL, MAX_RESPONSE_BYTES_IN_ALL)
IN_MEMORY = Room(*2 * (MAX_RESPONSES_IN_MEMORY, MAX_RESPONSE_BYTES_IN_MEMORY))

_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Stored(NamedTuple):
    """A response as it was sent, the items of its request, and all items of the conversation before that."""

    response: ResponseObject
    before: list[Item]
    given: list[Item]

    @property
    def items(self) -> list[Item]:
        """What a response that follows this one goes on from."""
        return [*self.before, *self.given, *self.response["output"]]

    @property
    def turn(self) -> list[Item]:
        """What it adds to a conversation, each with an id."""
        own = self.response["id"]
        return [*(given_in_full(own, i, item) for i, item in enumerate(self.given)), *self.response["output"]]


def given_in_full(response: str, index: int, item: Item) -> Item:
    """An item that a response was given, as lists show it."""
    return in_full(item, f"{response.partition('_')[2]}i{index}")


class ResponseTable:
    """Where there is no more room, the tenant that has the most of it loses its oldest: nobody empties another's share.

    Everything here blocks.
    """

    def __init__(self, database: Database, room: Room = ON_DISK) -> None:
        self._database, self._room = database, room

    def keep(self, tenant: str, stored: Stored) -> bool:
        """False if it is larger than all that a tenant may have. Raises Unavailable: (store_unwritable)."""
        blobs = msgspec.json.encode(stored.response), _packed(stored.before), _packed(stored.given)
        size = sum(map(len, blobs))
        if size > self._room.bytes:
            return False
        with self._database.transaction() as db:
            _forget(db, "created_at < ?", _oldest())
            row = (stored.response["id"], tenant, int(time.time()), size, *blobs)
            db.execute("insert into response values (?, ?, ?, ?, ?, ?, ?)", row)
            use(db, "response", tenant, 1, size)
            oldest = "rowid = (select min(rowid) from response where tenant = ?)"
            while (most := self._over(db, tenant)) is not None and _forget(db, oldest, most):
                pass
        return True

    def response(self, tenant: str, id: str) -> msgspec.Raw:
        """As it was sent, in JSON. Raises HTTPError: (response_not_found)."""
        return msgspec.Raw(self._row(tenant, id, "response")["response"])

    def get(self, tenant: str, id: str, param: str | None = None) -> Stored:
        """Raises HTTPError: (response_not_found)."""
        row = self._row(tenant, id, "response, before, given", param)
        response: ResponseObject = msgspec.json.decode(row["response"])
        return Stored(response, _unpacked(row["before"]), _unpacked(row["given"]))

    def given(self, tenant: str, id: str) -> list[Item]:
        """What it was given, each item as lists show it. Raises HTTPError: (response_not_found)."""
        items = _unpacked(self._row(tenant, id, "given")["given"])
        return [given_in_full(id, i, item) for i, item in enumerate(items)]

    def item(self, tenant: str, id: str, index: int, param: str, *, given: bool) -> Item | None:
        """Of what it was given, or of its output. Raises HTTPError: (response_not_found)."""
        blob = self._row(tenant, id, column := "given" if given else "response", param)[column]
        items = _ITEMS.decode(blob if given else _FIELDS.decode(blob)["output"])
        if index >= len(items):
            return None
        item: Item = msgspec.json.decode(items[index])
        return given_in_full(id, index, item) if given else item

    def delete(self, tenant: str, id: str) -> None:
        """Raises HTTPError: (response_not_found)."""
        with self._database.transaction() as db:
            _forget(db, "created_at < ?", _oldest())
            if not _forget(db, "id = ? and tenant = ?", id, tenant):
                raise _not_found(id, None)

    def _row(self, tenant: str, id: str, columns: str, param: str | None = None) -> dict[str, Any]:
        query = f"select {columns} from response where id = ? and tenant = ? and created_at >= ?"
        row = self._database.one(query, (id, tenant, _oldest()))
        if row is None:
            raise _not_found(id, param)
        return row

    def _over(self, db: sqlite3.Connection, tenant: str) -> str | None:
        """Who has to give one up: the tenant itself, or where there are too many in all, who has most of them."""
        room = self._room
        count, size = used(db, "response", tenant)
        if count > room.count or size > room.bytes:
            return tenant
        count, size = used(db, "response")
        if count <= room.count_in_all and size <= room.bytes_in_all:
            return None
        column = "count" if count > room.count_in_all else "bytes"
        query = f"select tenant from share where kind = 'response' order by {column} desc, tenant limit 1"
        return str(db.execute(query).fetchone()[0])


def _oldest() -> int:
    """When the oldest came that is there still."""
    return int(time.time()) - RESPONSE_DAYS * 86_400


def _forget(db: sqlite3.Connection, where: str, *values: object) -> int:
    """How many there were."""
    gone = db.execute(f"delete from response where {where} returning tenant, bytes", values).fetchall()
    for tenant, size in gone:
        use(db, "response", tenant, -1, -size)
    return len(gone)


def _packed(items: Iterable[Item]) -> bytes:
    """JSON, an item at a time: who waits for the interpreter has it in between."""
    return b"[" + b",".join([msgspec.json.encode(item) for item in items]) + b"]"


def _unpacked(blob: bytes) -> list[Item]:
    return [msgspec.json.decode(item) for item in _ITEMS.decode(blob)]


def _not_found(id: str, param: str | None) -> HTTPError:
    return HTTPError(
        "response_not_found",
        f"There is no response {id[:64]!r}",
        why=f"it was not stored, was deleted, is older than {RESPONSE_DAYS} days, or had to make room for newer ones",
        fix="send the whole conversation as input",
        param=param,
        status=404,
    )
