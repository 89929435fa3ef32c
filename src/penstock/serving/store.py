"""Files that clients upload, their batches, responses and conversations: SQLite, and a folder for the files' bytes.

Everything here blocks; the server calls it from threads. One process owns a store at a time. What was committed
outlives a kill of the process at any moment; what was not is done again.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
from contextlib import suppress
from pathlib import Path

from penstock.serving.batch_table import BatchTable
from penstock.serving.conversation_table import ConversationTable
from penstock.serving.database import COLUMNS, ID, Database, Kind, Once, Part, StoredFile, insert_file, not_found
from penstock.serving.errors import HTTPError
from penstock.serving.limits import MAX_STORED_BYTES
from penstock.serving.response_table import ResponseTable


class Store:
    """Raises Unavailable: (store_in_use) another process has it; (store_unusable) it cannot be opened or read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.database = folder, Database(folder)
        self.batches = BatchTable(self.database)
        self.responses = ResponseTable(self.database)
        self.conversations = ConversationTable(self.database)

    def close(self) -> None:
        self.database.close()

    def new_id(self, kind: Kind) -> str:
        return f"{kind}-{secrets.token_hex(16)}"

    def path(self, id: str) -> Path:
        """Of a file's bytes. Raises HTTPError: (file_not_found) that is no id."""
        if not ID.fullmatch(id):
            raise not_found("file", id)
        return self.folder / "files" / id

    def add(self, file: StoredFile, once: Once | None = None) -> str:
        """Makes a file known whose bytes are in place. Its id, or that of the one that the same request made before.

        Bytes that the tenant has stored already are kept once, and counted once.

        Raises HTTPError: (storage_full), (idempotency_key_reused).
        """
        with self.database.transaction() as db:
            if once is not None and (before := once.before(db, "file")) is not None:
                return before
            same = "select id from file where tenant = ? and sha256 = ? limit 1"
            twin = db.execute(same, (file.tenant, file.sha256)).fetchone()
            if twin is None:
                check_room(file, stored_bytes(db, file.tenant))
            insert_file(db, file)
            if once is not None:
                once.made(db, file.id)
        if twin is not None:
            self._share(twin[0], file.id)
        return file.id

    def _share(self, twin: str, id: str) -> None:
        """The bytes of one file become those of the other, too, where the file system can do that."""
        link = self.path(self.new_id("file"))  # what a kill leaves of it is removed as an upload that was not finished
        with suppress(OSError):
            os.link(self.path(twin), link)
            link.replace(self.path(id))

    def file(self, tenant: str, id: str) -> StoredFile:
        """Raises HTTPError: (file_not_found) the tenant has no such file."""
        row = self.database.one(f"select {COLUMNS['file']} from file where id = ? and tenant = ?", (id, tenant))
        if row is None:
            raise not_found("file", id)
        return StoredFile(**row)

    def files(self, tenant: str, part: Part, purpose: str | None) -> tuple[list[StoredFile], bool]:
        """As ``Database.part``."""
        equal = {} if purpose is None else {"purpose": purpose}
        rows, more = self.database.part("file", tenant, part, **equal)
        return [StoredFile(**row) for row in rows], more

    def delete(self, tenant: str, id: str) -> None:
        """Raises HTTPError: (file_not_found), (file_in_use) a batch that has not ended reads it."""
        self.file(tenant, id)
        with self.database.transaction() as db:
            if self.batches.reads(db, id):
                fix = "cancel the batch, or wait for its end"
                raise HTTPError("file_in_use", "A batch that has not ended reads this file", fix=fix, status=409)
            db.execute("delete from file where id = ?", (id,))
        self.path(id).unlink(missing_ok=True)

    def delete_expired(self) -> None:
        """Of all tenants; what a batch reads that has not ended stays until then."""
        due = self.database.all("select id from expiry where expires_at <= ?", (int(time.time()),))
        if not due:  # which is nearly always so
            return
        with self.database.transaction() as db:
            gone = [row["id"] for row in due if not self.batches.reads(db, row["id"])]
            db.executemany("delete from file where id = ?", [(id,) for id in gone])
        for id in gone:
            self.path(id).unlink(missing_ok=True)


def stored_bytes(db: sqlite3.Connection, tenant: str) -> int:
    """Of a tenant's files; those with the same content count as one."""
    distinct = "select distinct sha256, bytes from file where tenant = ?"
    [total] = db.execute(f"select coalesce(sum(bytes), 0) from ({distinct})", (tenant,)).fetchone()
    return int(total)


def check_room(file: StoredFile, stored: int) -> None:
    """Raises HTTPError: (storage_full)."""
    if stored + file.bytes > MAX_STORED_BYTES:
        raise HTTPError(
            "storage_full",
            "There is no room for this file",
            why=f"it has {file.bytes} bytes, {stored} are stored, and a client may store {MAX_STORED_BYTES}",
            fix="delete files that are no longer needed",
            status=413,
        )
