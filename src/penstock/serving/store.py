"""Files that clients upload, and their batches: SQLite for what is known of them, a folder for their bytes.

Everything here blocks; the server calls it from threads. One process owns a store at a time. What was committed
outlives a kill of the process at any moment; what was not is done again.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from penstock.serving.batch_table import BatchTable
from penstock.serving.database import ID, Database, Kind, Once, Part, StoredFile, insert_file, not_found
from penstock.serving.errors import HTTPError


class Store:
    """Raises Unavailable: (store_in_use) another process has it; (store_unusable) it cannot be opened or read."""

    def __init__(self, folder: Path) -> None:
        self.database = Database(folder)
        self.batches = BatchTable(self.database)

    def close(self) -> None:
        self.database.close()

    def new_id(self, kind: Kind) -> str:
        return f"{kind}-{secrets.token_hex(16)}"

    def path(self, id: str) -> Path:
        """Of a file's bytes. Raises HTTPError: (file_not_found) that is no id."""
        if not ID.fullmatch(id):
            raise not_found("file", id)
        return self.database.folder / "files" / id

    def add(self, file: StoredFile, once: Once | None = None) -> str:
        """Makes a file known whose bytes are in place. Its id, or that of the one that the same request made before."""
        with self.database.transaction() as db:
            if once is not None and (before := once.before(db, "file")) is not None:
                return before
            insert_file(db, file)
            if once is not None:
                once.made(db, file.id)
        return file.id

    def file(self, tenant: str, id: str) -> StoredFile:
        """Raises HTTPError: (file_not_found) the tenant has no such file."""
        row = self.database.one("select * from file where id = ? and tenant = ?", (id, tenant))
        if row is None:
            raise not_found("file", id)
        return StoredFile(**row)

    def files(self, tenant: str, part: Part, purpose: str | None) -> tuple[list[StoredFile], bool]:
        """As ``Database.part``."""
        equal = {} if purpose is None else {"purpose": purpose}
        rows, more = self.database.part("file", tenant, part, **equal)
        return [StoredFile(**row) for row in rows], more

    def stored_bytes(self, tenant: str) -> int:
        row = self.database.one("select coalesce(sum(bytes), 0) as bytes from file where tenant = ?", (tenant,))
        assert row is not None
        return int(row["bytes"])

    def delete(self, tenant: str, id: str) -> None:
        """Raises HTTPError: (file_not_found), (file_in_use) a batch that has not ended reads it."""
        self.file(tenant, id)
        with self.database.transaction() as db:
            if self.batches.reads(db, id):
                fix = "cancel the batch, or wait for its end"
                raise HTTPError("file_in_use", "A batch that has not ended reads this file", fix=fix, status=409)
            db.execute("delete from file where id = ?", (id,))
        self.path(id).unlink(missing_ok=True)
