"""What answers at /v1/files and /v1/batches."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from penstock.serving import files
from penstock.serving.batches import Batches, BatchRequest, shown
from penstock.serving.edge import parse, read_body
from penstock.serving.gate import current
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
    batches: Batches = request.app.state.context.batches
    if request.method == "POST":
        batches.context.admit(None)
        current.get().enter()
    return Asked(batches, await batches.store(), current.get().tenant, request.path_params.get("id", ""))


async def files_of_all(request: Request) -> Response:
    asked = await _asked(request)
    if request.method == "POST":
        return _json(await files.upload(request, asked.store, asked.tenant))
    found = await asyncio.to_thread(asked.store.files, asked.tenant, request.query_params.get("purpose"))
    return _json(files.page(request, found, lambda file: file.id, files.shown))


async def one_file(request: Request) -> Response:
    asked = await _asked(request)
    if request.method == "DELETE":
        await asyncio.to_thread(asked.store.delete, asked.tenant, asked.id)
        return _json(files.Deleted(asked.id))
    return _json(files.shown(await asyncio.to_thread(asked.store.file, asked.tenant, asked.id)))


async def file_content(request: Request) -> Response:
    asked = await _asked(request)
    return await files.content(asked.store, asked.tenant, asked.id)


async def batches_of_all(request: Request) -> Response:
    asked = await _asked(request)
    if request.method == "POST":
        return _json(await asked.batches.create(parse(await read_body(request), BatchRequest), asked.tenant))
    found = await asyncio.to_thread(asked.store.batches.of, asked.tenant)
    return _json(files.page(request, found, lambda batch: batch.id, shown))


async def one_batch(request: Request) -> Response:
    asked = await _asked(request)
    return _json(shown(await asyncio.to_thread(asked.store.batches.get, asked.tenant, asked.id)))


async def cancel_batch(request: Request) -> Response:
    asked = await _asked(request)
    return _json(await asked.batches.cancel(asked.tenant, asked.id))


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
