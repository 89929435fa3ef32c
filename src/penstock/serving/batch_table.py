"""Batches and their lines, in the database of a store."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import msgspec

from penstock.base import OverLimit
from penstock.serving.database import Database, Once, Part, StoredFile, insert_file, not_found
from penstock.serving.limits import MAX_UNFINISHED_BATCHES

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
LIVE: tuple[Status, ...] = ("validating", "in_progress", "finalizing", "cancelling")


class Complaint(msgspec.Struct):
    """Why a batch cannot be begun. ``line`` counts from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch of a tenant; times are seconds since the epoch, None until they come.

    Attributes:
        model: of lines that name none: the server's first when it came, whether or not it is served now.
        outputs_stay: seconds after which its output files are deleted; None for never.
    """

    id: str
    tenant: str
    model: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    status: Status = "validating"
    metadata: dict[str, str] | None = None
    outputs_stay: int | None = None
    errors: tuple[Complaint, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def moved(self, status: Status) -> Batch:
        """In another state, from now on."""
        changes: dict[str, Any] = {"status": status, f"{status}_at": int(time.time())}
        return replace(self, **changes)


@dataclass(frozen=True, slots=True)
class Line:
    """Where a request of a batch is in its file, in bytes. Attributes: number: from 1."""

    number: int
    custom_id: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Done:
    """A line's answer, as it will stand in the output file or, if it ``failed``, in the error file."""

    number: int
    failed: bool
    result: bytes
    tokens_in: int = 0
    tokens_out: int = 0


class BatchTable:
    def __init__(self, database: Database) -> None:
        self._database = database

    def reads(self, db: sqlite3.Connection, file: str) -> bool:
        """Whether a batch that has not ended needs the file."""
        live = db.execute(f"select body from batch where status in {LIVE}").fetchall()
        return any(msgspec.json.decode(body)["input_file_id"] == file for [body] in live)

    def begin(self, batch: Batch, once: Once | None = None) -> str:
        """Its id, or that of the one that the same request made before. Raises OverLimit: (too_many_batches)."""
        with self._database.transaction() as db:
            if once is not None and (before := once.before(db, "batch")) is not None:
                return before
            ahead = f"select count(*) from batch where tenant = ? and status in {LIVE}"
            [unfinished] = db.execute(ahead, (batch.tenant,)).fetchone()
            if unfinished >= MAX_UNFINISHED_BATCHES:
                raise OverLimit(
                    "too_many_batches",
                    "Too many of your batches have not ended",
                    why=f"they are {unfinished}, and at most {MAX_UNFINISHED_BATCHES} are carried out or wait",
                    fix="wait for one to end, or cancel one",
                    retry_after=60.0,
                )
            db.execute(
                "insert into batch values (?, ?, ?, ?, ?, ?)",
                (batch.id, batch.tenant, batch.model, batch.created_at, batch.status, _body(batch)),
            )
            if once is not None:
                once.made(db, batch.id)
        return batch.id

    def change(self, id: str, alter: Callable[[Batch], Batch]) -> Batch:
        """Another writer's change is never lost: ``alter`` gets the batch as it stands."""
        with self._database.transaction() as db:
            return _changed(db, id, alter)

    def get(self, tenant: str, id: str) -> Batch:
        """Raises HTTPError: (batch_not_found) the tenant has no such batch."""
        row = self._database.one("select * from batch where id = ? and tenant = ?", (id, tenant))
        if row is None:
            raise not_found("batch", id)
        return _batch(row)

    def of(self, tenant: str, part: Part) -> tuple[list[Batch], bool]:
        """As ``Database.part``."""
        rows, more = self._database.part("batch", tenant, part)
        return [_batch(row) for row in rows], more

    def unfinished(self) -> list[Batch]:
        """Those of all tenants, the oldest first."""
        rows = self._database.all(f"select * from batch where status in {LIVE} order by created_at, rowid", ())
        return [_batch(row) for row in rows]

    def start_lines(self, id: str, lines: Sequence[Line]) -> Batch:
        """These are the lines of a batch that was validating: it is in progress, unless it was cancelled meanwhile."""

        def begun(batch: Batch) -> Batch:
            counted = replace(batch, total=len(lines))
            return counted.moved("in_progress") if batch.status == "validating" else counted

        with self._database.transaction() as db:
            db.execute("delete from line where batch = ?", (id,))
            rows = ((id, line.number, line.custom_id, line.start, line.length) for line in lines)
            db.executemany("insert into line (batch, number, custom_id, start, length) values (?, ?, ?, ?, ?)", rows)
            return _changed(db, id, begun)

    def waiting_lines(self, batch: str, after: int, limit: int) -> list[Line]:
        """Those without an answer, in the order of the file."""
        query = (
            "select number, custom_id, start, length from line where batch = ? and number > ? and failed is null "
            "order by number limit ?"
        )
        return [Line(**row) for row in self._database.all(query, (batch, after, limit))]

    def finish_lines(self, id: str, done: Sequence[Done]) -> Batch:
        """Commits answers; the batch with its counts."""

        def counted(batch: Batch) -> Batch:
            return replace(
                batch,
                completed=batch.completed + sum(not line.failed for line in done),
                failed=batch.failed + sum(line.failed for line in done),
                input_tokens=batch.input_tokens + sum(line.tokens_in for line in done),
                output_tokens=batch.output_tokens + sum(line.tokens_out for line in done),
            )

        with self._database.transaction() as db:
            db.executemany(
                "update line set failed = ?, result = ?, tokens_in = ?, tokens_out = ? where batch = ? and number = ?",
                [(int(x.failed), x.result, x.tokens_in, x.tokens_out, id, x.number) for x in done],
            )
            return _changed(db, id, counted)

    def results(self, batch: str, *, failed: bool) -> Iterator[bytes]:
        """In the order of the file, without holding up other calls."""
        after = 0
        query = (
            "select number, result from line where batch = ? and failed = ? and number > ? order by number limit 256"
        )
        while rows := self._database.all(query, (batch, failed, after)):
            for row in rows:
                yield row["result"]
            after = rows[-1]["number"]

    def finish(self, id: str, alter: Callable[[Batch], Batch], outputs: Iterable[StoredFile]) -> Batch:
        """The batch has ended, and its output files are files like others; answers by line are forgotten."""
        with self._database.transaction() as db:
            for file in outputs:
                insert_file(db, file)
            db.execute("delete from line where batch = ?", (id,))
            return _changed(db, id, alter)


_COLUMNS = ("id", "tenant", "model", "created_at", "status")


def _body(batch: Batch) -> str:
    return msgspec.json.encode(
        {x.name: getattr(batch, x.name) for x in fields(Batch) if x.name not in _COLUMNS}
    ).decode()


def _batch(row: dict[str, Any]) -> Batch:
    return msgspec.convert(msgspec.json.decode(row.pop("body")) | row, Batch)


def _changed(db: sqlite3.Connection, id: str, alter: Callable[[Batch], Batch]) -> Batch:
    cursor = db.execute("select * from batch where id = ?", (id,))
    names = [column[0] for column in cursor.description]
    batch = alter(_batch(dict(zip(names, cursor.fetchone(), strict=True))))
    db.execute("update batch set status = ?, body = ? where id = ?", (batch.status, _body(batch), id))
    return batch
