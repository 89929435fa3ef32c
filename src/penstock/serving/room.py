"""How much of a kind a store has room for, and how much of it each tenant has."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Literal

Kind = Literal["response", "conversation"]


@dataclass(frozen=True, slots=True)
class Room:
    """The most that one tenant may have, and all of them together."""

    count: int
    bytes: int
    count_in_all: int
    bytes_in_all: int


def used(db: sqlite3.Connection, kind: Kind, tenant: str | None = None) -> tuple[int, int]:
    """How many of them a tenant has, or all of them, and their bytes."""
    query = "select coalesce(sum(count), 0), coalesce(sum(bytes), 0) from share where kind = ?"
    if tenant is None:
        found = db.execute(query, (kind,)).fetchone()
    else:
        found = db.execute(f"{query} and tenant = ?", (kind, tenant)).fetchone()
    return int(found[0]), int(found[1])


def use(db: sqlite3.Connection, kind: Kind, tenant: str, count: int, bytes: int) -> None:
    """Adds to what the tenant has; in the transaction that changes it, so that neither is ever without the other."""
    db.execute(
        "insert into share values (?, ?, ?, ?) "
        "on conflict (kind, tenant) do update set count = count + excluded.count, bytes = bytes + excluded.bytes",
        (kind, tenant, count, bytes),
    )
