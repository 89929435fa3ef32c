"""What answers at /v1/files and /v1/batches."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from penstock.serving import files
from penstock.serving.batches import Batches, BatchObject, BatchRequest, shown
from penstock.serving.context import context_of
from penstock.serving.database import Part
from penstock.serving.edge import as_json, body_of, off_loop, parse
from penstock.serving.errors import invalid
from penstock.serving.gate import current
from penstock.serving.limits import MAX_FILES_LISTED
from penstock.serving.operations import IDEMPOTENCY_KEY, KEY, operation
from penstock.serving.store import Store


@dataclass(frozen=True, slots=True)
class Asked:
    """Whose request it is, and the id it names."""

    batches: Batches
    store: Store
    tenant: str
    id: str


async def _asked(request: Request) -> Asked:
    """Raises OverLimit, Unavailable: what writes is counted like any other request, and is refused in a drain."""
    batches = context_of(request).batches
    if request.method == "POST":
        batches.context.admit(None)
        current.get().enter()
    return Asked(batches, await batches.store(), current.get().tenant, request.path_params.get("id", ""))


def _key(request: Request) -> str | None:
    """Under which the client may send the request again (draft-ietf-httpapi-idempotency-key-header)."""
    key = request.headers.get(IDEMPOTENCY_KEY)
    if key is not None and not re.fullmatch(KEY, key):
        raise invalid(IDEMPOTENCY_KEY, "it must be 1 to 255 visible characters of ASCII")
    return key


@operation("List files, the newest first.", query=files.FileQuery, gives=files.Page[files.FileObject])
@operation("Upload a file.", form=files.UploadForm, gives=files.FileObject, once=True)
async def files_of_all(request: Request) -> Response:
    asked = await _asked(request)
    if request.method == "POST":
        return as_json(await files.upload(request, asked.store, asked.tenant, _key(request)))
    part, purpose = files.part_of(request.query_params, most=MAX_FILES_LISTED), request.query_params.get("purpose")
    return await asyncio.to_thread(_files, asked, part, purpose)


@operation("Describe a file.", gives=files.FileObject)
@operation("Delete a file.", method="DELETE", gives=files.Deleted)
async def one_file(request: Request) -> Response:
    asked = await _asked(request)
    if request.method == "DELETE":
        await asyncio.to_thread(asked.store.delete, asked.tenant, asked.id)
        return as_json(files.Deleted(asked.id))
    return as_json(files.shown(await asyncio.to_thread(asked.store.file, asked.tenant, asked.id)))


@operation("Download a file.", gives="application/octet-stream")
async def file_content(request: Request) -> Response:
    asked = await _asked(request)
    return await files.content(asked.store, asked.tenant, asked.id)


@operation("List batches, the newest first.", query=files.PageQuery, gives=files.Page[BatchObject])
@operation("Begin a batch.", takes=BatchRequest, gives=BatchObject, once=True)
async def batches_of_all(request: Request) -> Response:
    asked = await _asked(request)
    if request.method == "POST":
        async with body_of(request) as body:
            wanted = await off_loop(len(body), partial(parse, body, BatchRequest))
        return as_json(await asked.batches.create(wanted, asked.tenant, _key(request)))
    part = files.part_of(request.query_params)
    return await asyncio.to_thread(_batches, asked, part)  # each may have a page of complaints


@operation("Describe a batch.", gives=BatchObject)
async def one_batch(request: Request) -> Response:
    asked = await _asked(request)
    return as_json(shown(await asyncio.to_thread(asked.store.batches.get, asked.tenant, asked.id)))


@operation("Cancel a batch.", method="POST", gives=BatchObject)
async def cancel_batch(request: Request) -> Response:
    asked = await _asked(request)
    return as_json(await asked.batches.cancel(asked.tenant, asked.id))


def _files(asked: Asked, part: Part, purpose: str | None) -> Response:
    return as_json(files.page(asked.store.files(asked.tenant, part, purpose), files.shown))


def _batches(asked: Asked, part: Part) -> Response:
    return as_json(files.page(asked.store.batches.of(asked.tenant, part), shown))
