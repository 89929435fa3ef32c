"""/v1/files: what clients upload for batches, and what batches leave for them."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Protocol, TypeVar
from urllib.parse import quote

import msgspec
from msgspec import Meta
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.types import Message

from penstock.base import Unavailable
from penstock.serving.database import Once, Part, StoredFile, not_found, unwritable
from penstock.serving.errors import HTTPError, invalid
from penstock.serving.gate import Gate, current
from penstock.serving.limits import (
    FILE_SECONDS,
    MAX_FILE_BYTES,
    MAX_FILE_NAME,
    MAX_FILES_LISTED,
    MAX_LISTED,
    MAX_SPOOLED_BYTES,
    MAX_STAY_SECONDS,
    MIN_STAY_SECONDS,
)
from penstock.serving.store import Store

PURPOSES = ("batch", "batch_output")
PIECE = 1 << 20
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
T = TypeVar("T")
I = TypeVar("I", bound="Item")


class PageQuery(msgspec.Struct, kw_only=True):
    limit: Annotated[int, Meta(ge=1, le=MAX_LISTED)] | None = None
    after: str | None = None
    order: Literal["asc", "desc"] | None = None


class FileQuery(PageQuery, kw_only=True):
    limit: Annotated[int, Meta(ge=1, le=MAX_FILES_LISTED)] | None = None
    purpose: str | None = None


Stay = Annotated[int, Meta(ge=MIN_STAY_SECONDS, le=MAX_STAY_SECONDS)]


class ExpiresAfter(msgspec.Struct, kw_only=True):
    """When a file is deleted: so many seconds after it was made."""

    anchor: Literal["created_at"]
    seconds: Stay


class UploadForm(msgspec.Struct, kw_only=True):
    purpose: Literal["batch"]
    file: bytes
    anchor: Literal["created_at"] | None = msgspec.field(name=ANCHOR, default=None)
    seconds: Stay | None = msgspec.field(name=SECONDS, default=None)


class FileObject(msgspec.Struct, kw_only=True):
    """OpenAI's File."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    object: str = "file"
    status: str = "processed"
    expires_at: int | None = None


class Item(Protocol):
    id: str


class Page(msgspec.Struct, Generic[I], kw_only=True):
    """Of a list. ``after`` = ``last_id`` asks for the next one."""

    data: list[I]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: str = "list"


class Deleted(msgspec.Struct):
    id: str
    object: str = "file"
    deleted: bool = True


def shown(file: StoredFile) -> FileObject:
    own = (name for name in FileObject.__struct_fields__ if hasattr(file, name))
    return FileObject(**{name: getattr(file, name) for name in own})


async def upload(request: Request, store: Store, tenant: str, key: str | None = None) -> FileObject:
    """POST /v1/files: a form as of ``UploadForm``. ``key``: the client's own, under which it may ask again.

    Raises:
        HTTPError: 415, 413, 409, 408, 400.
        Unavailable: (store_unwritable), (spool_full) the files of others take up MAX_SPOOLED_BYTES.
    """
    _is_form(request)
    if int(request.headers.get("content-length", "0")) > MAX_FILE_BYTES + PIECE:
        raise _too_large()
    spool = Spool(current.get().gate)
    bounded = Request(request.scope, _bounded(request, spool))
    try:
        async with asyncio.timeout(FILE_SECONDS), bounded.form(max_files=1, max_fields=8) as form:
            purpose, file = form.get("purpose"), form.get("file")
            if purpose != "batch":
                raise invalid("purpose", 'it must be "batch"')
            if not isinstance(file, UploadFile):
                raise HTTPError("invalid_parameter", "file is required", param="file")
            name = Path(file.filename or "upload.jsonl").name[:MAX_FILE_NAME]
            return shown(await asyncio.to_thread(_keep, store, tenant, name, file.file, key, _stay(form)))
    except TimeoutError:
        why, fix = f"waited {FILE_SECONDS:g} s", "send it again, or split it into several batches"
        raise HTTPError("request_timeout", "The file did not arrive in time", why=why, fix=fix, status=408) from None
    except OSError as error:  # while it came it was in the folder of temporary files
        raise unwritable(error) from error
    except HTTPException:
        fix = "send multipart/form-data with the fields purpose and file"
        raise HTTPError("invalid_form", "The form cannot be read", fix=fix) from None
    finally:
        spool.close()


def _stay(form: FormData) -> int | None:
    """Seconds after which the file is deleted. Raises HTTPError: (invalid_parameter)."""
    named = [name for name in form if name.startswith("expires_after")]
    if not named:
        return None
    if sorted(named) != [ANCHOR, SECONDS]:
        raise invalid("expires_after", f"a form says it in two fields, {ANCHOR} and {SECONDS}")
    anchor, seconds = form[ANCHOR], form[SECONDS]
    if anchor != "created_at":
        raise invalid(ANCHOR, 'it must be "created_at"')
    if not (isinstance(seconds, str) and re.fullmatch("[0-9]{1,9}", seconds)):
        raise invalid(SECONDS, "it must be a whole number")
    if not MIN_STAY_SECONDS <= int(seconds) <= MAX_STAY_SECONDS:
        raise invalid(SECONDS, f"it must be {MIN_STAY_SECONDS} to {MAX_STAY_SECONDS}")
    return int(seconds)


def _keep(store: Store, tenant: str, name: str, source: Any, key: str | None, stay: int | None) -> StoredFile:
    pieces = iter(lambda: source.read(PIECE), b"")
    return keep(store, tenant, name, "batch", pieces, key, stay)


def keep(
    store: Store,
    tenant: str,
    name: str,
    purpose: str,
    pieces: Any,
    key: str | None = None,
    stay: int | None = None,
) -> StoredFile:
    """Writes a file and makes it known, unless the same was sent with this key before: then it is that one.

    Args:
        stay: seconds after which it is deleted; None for never.

    Raises:
        HTTPError: (storage_full), (idempotency_key_reused).
        Unavailable: (store_unwritable)
    """
    file = write(store, tenant, name, purpose, pieces, stay)
    try:
        lasting = "" if stay is None else f"{stay} s "
        once = None if key is None else Once(tenant, key, f"file {file.sha256} {purpose} {lasting}{name}")
        id = store.add(file, once)
    except BaseException:
        store.path(file.id).unlink()
        raise
    if id != file.id:
        store.path(file.id).unlink()
    return store.file(tenant, id)


def write(store: Store, tenant: str, name: str, purpose: str, pieces: Any, stay: int | None = None) -> StoredFile:
    """A file whose bytes outlive a loss of power; nobody knows of it yet. Raises Unavailable: (store_unwritable)."""
    id, digest, size = store.new_id("file"), hashlib.sha256(), 0
    try:
        with store.path(id).open("xb") as target:
            for piece in pieces:
                target.write(piece)
                digest.update(piece)
                size += len(piece)
            target.flush()
            os.fsync(target.fileno())
        _sync_folder(store.path(id).parent)
    except BaseException as error:
        store.path(id).unlink(missing_ok=True)  # a full disk shall not be filled by what is of no use
        if isinstance(error, OSError):
            raise unwritable(error) from error
        raise
    now = int(time.time())
    return StoredFile(
        id=id,
        tenant=tenant,
        filename=name,
        purpose=purpose,
        bytes=size,
        created_at=now,
        sha256=digest.hexdigest(),
        expires_at=None if stay is None else now + stay,
    )


def _sync_folder(folder: Path) -> None:
    """Puts the names in it on the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


async def content(store: Store, tenant: str, id: str) -> Response:
    """GET /v1/files/{id}/content"""
    file = await asyncio.to_thread(store.file, tenant, id)
    if not (path := store.path(id)).is_file():
        raise not_found("file", id)
    headers = {"content-disposition": f"attachment; filename*=utf-8''{quote(file.filename, safe='')}"}
    return FileResponse(path, headers=headers, media_type="application/octet-stream")


def part_of(query: Mapping[str, str], shown: int = MAX_LISTED, most: int = MAX_LISTED) -> Part:
    """What ``limit``, ``after`` and ``order`` ask for; ``shown`` items at a time where they do not say.

    Raises HTTPError: (invalid_parameter).
    """
    limit, after, order = limit_of(query, shown, most), query.get("after"), query.get("order")
    if order not in (None, "asc", "desc"):
        raise invalid("order", 'it must be "asc" or "desc"')
    return Part(limit, after, order == "asc")


def limit_of(query: Mapping[str, str], shown: int, most: int) -> int:
    """How many items of a list are asked for; ``shown`` where that is not said.

    Raises HTTPError: (invalid_parameter).
    """
    if (limit := query.get("limit")) is None:
        return shown
    if re.fullmatch("[0-9]{1,9}", limit) is None or not 1 <= int(limit) <= most:
        raise invalid("limit", f"it must be 1 to {most}")
    return int(limit)


def page(found: tuple[Sequence[T], bool], show: Callable[[T], I]) -> Page[I]:
    """Of items, and whether there are more."""
    data, more = [show(item) for item in found[0]], found[1]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return Page(data=data, has_more=more, first_id=first, last_id=last)


def _is_form(request: Request) -> None:
    """Raises HTTPError: (unsupported_media_type)."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise HTTPError(
            "unsupported_media_type",
            "The body is not declared to be a form",
            fix="send multipart/form-data with the fields purpose and file",
            status=415,
        )


@dataclass(slots=True)
class Spool:
    """What has come of one upload. Its place is given back by ``close``."""

    gate: Gate
    bytes: int = 0

    def add(self, more: int) -> None:
        """Raises HTTPError: (file_too_large). Unavailable: (spool_full)."""
        if self.bytes + more > MAX_FILE_BYTES + PIECE:
            raise _too_large()
        if self.gate.spooled + more > MAX_SPOOLED_BYTES:
            raise Unavailable(
                "spool_full",
                "The server is taking as many files as it has room for",
                why=f"{self.gate.spooled} of {MAX_SPOOLED_BYTES} bytes of files that are being uploaded",
                fix="send it again in a minute",
                retry_after=30.0,
            )
        self.gate.spooled += more
        self.bytes += more

    def close(self) -> None:
        self.gate.spooled -= self.bytes
        self.bytes = 0


def _bounded(request: Request, spool: Spool) -> Callable[[], Any]:
    """Receives the body, as much of it as a file may have and there is room for."""

    async def receive() -> Message:
        message = await request.receive()
        spool.add(len(message.get("body", b"")))
        return message

    return receive


def _too_large() -> HTTPError:
    return HTTPError(
        "file_too_large",
        "The file is too large",
        why=f"more than {MAX_FILE_BYTES} bytes",
        fix="split it into several batches",
        status=413,
    )
