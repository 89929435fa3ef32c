"""The SQLite file of a store: its tables, and the files it knows."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TextIO

from penstock.base import PenstockError, Unavailable
from penstock.serving.errors import HTTPError

VERSION = 1
"""Of the tables. Another one is refused rather than guessed at."""

Kind = Literal["file", "batch"]
ID = re.compile(r"(file|batch)-[0-9a-f]{32}")
_log = logging.getLogger(__name__)
_TABLES = """
create table file (
    id text primary key, tenant text not null, filename text not null, purpose text not null, bytes integer not null,
    created_at integer not null, sha256 text not null
) strict;
create table batch (
    id text primary key, tenant text not null, model text not null, created_at integer not null, status text not null,
    body text not null
) strict;
create table line (
    batch text not null, number integer not null, custom_id text not null, start integer not null,
    length integer not null, failed integer, result blob, tokens_in integer, tokens_out integer,
    primary key (batch, number)
) strict, without rowid;
"""


_ADDED = """
create table if not exists once (
    tenant text not null, key text not null, id text not null, digest text not null, created_at integer not null,
    primary key (tenant, key)
) strict, without rowid;
create index if not exists once_by_age on once (created_at);
create index if not exists file_of_tenant on file (tenant, created_at);
create index if not exists batch_of_tenant on batch (tenant, created_at);
create table if not exists response (
    id text primary key, tenant text not null, created_at integer not null, bytes integer not null,
    response blob not null, before blob not null, given blob not null
) strict;
create index if not exists response_of_tenant on response (tenant);
create index if not exists response_by_age on response (created_at);
create table if not exists conversation (
    id text primary key, tenant text not null, created_at integer not null, metadata text not null
) strict;
create table if not exists item (
    number integer primary key, conversation text not null references conversation (id) on delete cascade,
    id text not null, body blob not null
) strict;
create index if not exists item_of_conversation on item (conversation);
create unique index if not exists item_by_id on item (id, conversation);
create table if not exists share (
    kind text not null, tenant text not null, count integer not null, bytes integer not null,
    primary key (kind, tenant)
) strict, without rowid;
create table if not exists expiry (
    id text primary key references file (id) on delete cascade, expires_at integer not null
) strict, without rowid;
create index if not exists expiry_by_time on expiry (expires_at);
"""
"""What came after version 1 and changes none of it, so that either build opens what the other made."""

COLUMNS = {
    "batch": "*",
    "file": "*, (select expires_at from expiry where expiry.id = file.id) as expires_at",
}
"""What there is to say of each."""

REMEMBERED = 86_400
"""Seconds that an Idempotency-Key is known for."""


@dataclass(frozen=True, slots=True)
class Once:
    """What a client that may send a request again says of it. Attributes: digest: of all that it asks."""

    tenant: str
    key: str
    digest: str

    def before(self, db: sqlite3.Connection, kind: Kind) -> str | None:
        """The id of what the same request made before, if that is still there.

        Raises:
            HTTPError: (idempotency_key_reused) another request had this key.
        """
        db.execute("delete from once where created_at < ?", (int(time.time()) - REMEMBERED,))
        mine = (self.tenant, self.key)
        found = db.execute("select id, digest from once where tenant = ? and key = ?", mine).fetchone()
        if found is None:
            return None
        id, digest = found
        if digest != self.digest:
            raise HTTPError(
                "idempotency_key_reused",
                "Another request had this Idempotency-Key",
                why=f"it made {id}",
                fix="send the same request again with the same key, and another with a key of its own",
                status=409,
            )
        return id if db.execute(f"select 1 from {kind} where id = ?", (id,)).fetchone() else None

    def made(self, db: sqlite3.Connection, id: str) -> None:
        row = (self.tenant, self.key, id, self.digest, int(time.time()))
        db.execute("insert or replace into once values (?, ?, ?, ?, ?)", row)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file of a tenant. Attributes: sha256: of its bytes, in hex. expires_at: None: it stays until it is deleted."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    sha256: str
    expires_at: int | None = None


class Database:
    """Any thread may use it.

    Args:
        folder: of the store; None for one in memory, which ends with the process.

    Raises:
        Unavailable: (store_in_use) another process has it; (store_unusable) it cannot be opened or read.
    """

    def __init__(self, folder: Path | None) -> None:
        self._lock = threading.Lock()
        self._claim = None if folder is None else _claimed(folder)
        try:
            self._open(folder)
        except (sqlite3.Error, OSError) as error:
            if self._claim is not None:
                self._claim.close()
            raise _unusable(folder, error) from error

    def _open(self, folder: Path | None) -> None:
        path = Path(":memory:") if folder is None else folder / "store.sqlite"
        if folder is not None:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        for pragma in ("journal_mode=wal", "synchronous=normal", "foreign_keys=on"):
            self._db.execute(f"pragma {pragma}")
        [version] = self._db.execute("pragma user_version").fetchone()
        if version == 0:
            self._db.executescript(f"begin; {_TABLES} pragma user_version={VERSION}; commit;")
        elif version != VERSION:
            raise sqlite3.DatabaseError(f"it is of version {version}, and this build reads {VERSION}")
        self._db.executescript(f"begin; {_ADDED} commit;")
        if folder is None:
            return
        known = {row[0] for row in self._db.execute("select id from file")}
        for path in (folder / "files").iterdir():  # of uploads and outputs that were not finished
            if ID.fullmatch(path.name) and path.name not in known:  # whatever else is there is not this server's
                path.unlink()

    def close(self) -> None:
        with self._lock:
            self._db.close()
            if self._claim is not None:
                self._claim.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Raises Unavailable: (store_unwritable)."""
        with self._lock:
            try:
                self._db.execute("begin immediate")
                yield self._db
                self._db.execute("commit")
            except BaseException as error:
                if self._db.in_transaction:  # SQLite has ended it of itself after some errors, a full disk's commit not
                    self._db.execute("rollback")
                if isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError:  # or it is torn
                    raise unwritable(error) from error
                raise

    def part(self, kind: Kind, tenant: str, part: Part, **equal: str) -> tuple[list[dict[str, Any]], bool]:
        """Rows of the tenant, and whether there are more; ``equal``: what columns must be.

        Raises HTTPError: (invalid_parameter) ``after`` names nothing of it.
        """
        where, values = ["tenant = ?", *(f"{name} = ?" for name in equal)], [tenant, *equal.values()]
        if part.after is not None:
            if self.one(f"select 1 from {kind} where id = ? and tenant = ?", (part.after, tenant)) is None:
                raise HTTPError("invalid_parameter", "after names nothing in this list", param="after")
            than = ">" if part.ascending else "<"
            where.append(f"(created_at, rowid) {than} (select created_at, rowid from {kind} where id = ?)")
            values.append(part.after)
        order = "asc" if part.ascending else "desc"
        rows = self.all(
            f"select {COLUMNS[kind]} from {kind} where {' and '.join(where)} "
            f"order by created_at {order}, rowid {order} limit {part.limit + 1:d}",
            tuple(values),
        )
        return rows[: part.limit], len(rows) > part.limit

    def one(self, query: str, values: tuple[object, ...]) -> dict[str, Any] | None:
        return next(iter(self.all(query, values)), None)

    def all(self, query: str, values: tuple[object, ...]) -> list[dict[str, Any]]:
        with self._lock:
            cursor = self._db.execute(query, values)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor]


@dataclass(frozen=True, slots=True)
class Part:
    """Of a list of what a tenant has, the newest first unless ``ascending``: at most ``limit``, those after an id."""

    limit: int
    after: str | None = None
    ascending: bool = False


def not_found(kind: Kind, id: str) -> HTTPError:
    shown = f"{id!r:.80}"
    return HTTPError(f"{kind}_not_found", f"There is no {kind} {shown}", fix=f"see GET /v1/{_PLURAL[kind]}", status=404)


_PLURAL = {"file": "files", "batch": "batches"}


def _claimed(folder: Path) -> TextIO:
    """What tells other processes that the store is taken, until it is closed."""
    try:
        (folder / "files").mkdir(mode=0o700, parents=True, exist_ok=True)
        claim = (folder / "lock").open("a")
    except OSError as error:
        raise _unusable(folder, error) from error
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        claim.close()
        if not isinstance(error, BlockingIOError):
            raise _unusable(folder, error) from error
        _log.error("another server uses the store %s: start this one with a --store of its own", folder)
        raise Unavailable(
            "store_in_use",
            "Files, batches and conversations are not to be had here",
            why="another server uses the same store",
            fix="ask that one, or have this one started with a --store of its own",
        ) from None
    return claim


def _unusable(folder: Path | None, error: Exception) -> PenstockError:
    """What the disk said is for the log, as it is in ``unwritable``."""
    _log.error("the store %s cannot be used: %s; mend or remove it, or start with another --store", folder, error)
    return Unavailable(
        "store_unusable",
        "Files, batches and conversations are not to be had here",
        why="their store cannot be read",
        fix="have it mended, or the server started with another --store; its log says what is wrong",
    )


def unwritable(error: Exception) -> PenstockError:
    """What the disk said is for the log: it may name a path."""
    _log.error("the store cannot be written: %s", error)
    return Unavailable(
        "store_unwritable", "Files, batches and conversations cannot be written now", fix="try again later"
    )


def insert_file(db: sqlite3.Connection, file: StoredFile) -> None:
    names = [one.name for one in fields(StoredFile) if one.name != "expires_at"]
    marks = ", ".join("?" * len(names))
    db.execute(f"insert into file ({', '.join(names)}) values ({marks})", [getattr(file, name) for name in names])
    if file.expires_at is not None:
        db.execute("insert into expiry values (?, ?)", (file.id, file.expires_at))
