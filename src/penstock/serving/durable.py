"""Routes of /v1/files and /v1/batches."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from penstock.serving import files
from penstock.serving.batches import Batches, BatchRequest, shown
from penstock.serving.edge import parse, read_body
from penstock.serving.store import Store


def batch_routes() -> list[Route]:
    return [
        Route("/v1/files", _upload, methods=["POST"]),
        Route("/v1/files", _files, methods=["GET"]),
        Route("/v1/files/{id}", _file, methods=["GET"]),
        Route("/v1/files/{id}", _delete, methods=["DELETE"]),
        Route("/v1/files/{id}/content", _content, methods=["GET"]),
        Route("/v1/batches", _create, methods=["POST"]),
        Route("/v1/batches", _batches, methods=["GET"]),
        Route("/v1/batches/{id}", _batch, methods=["GET"]),
        Route("/v1/batches/{id}/cancel", _cancel, methods=["POST"]),
    ]


@dataclass(frozen=True, slots=True)
class Asked:
    """Whose request it is, and the id it names."""

    batches: Batches
    store: Store
    tenant: str
    id: str


async def _asked(request: Request) -> Asked:
    batches: Batches = request.app.state.context.batches
    return Asked(batches, await batches.store(), "", request.path_params.get("id", ""))


async def _upload(request: Request) -> Response:
    asked = await _asked(request)
    return _json(await files.upload(request, asked.store, asked.tenant))


async def _files(request: Request) -> Response:
    asked = await _asked(request)
    found = await asyncio.to_thread(asked.store.files, asked.tenant, request.query_params.get("purpose"))
    return _json(files.page(request, found, lambda file: file.id, files.shown))


async def _file(request: Request) -> Response:
    asked = await _asked(request)
    return _json(files.shown(await asyncio.to_thread(asked.store.file, asked.tenant, asked.id)))


async def _delete(request: Request) -> Response:
    asked = await _asked(request)
    await asyncio.to_thread(asked.store.delete, asked.tenant, asked.id)
    return _json(files.Deleted(asked.id))


async def _content(request: Request) -> Response:
    asked = await _asked(request)
    return await files.content(asked.store, asked.tenant, asked.id)


async def _create(request: Request) -> Response:
    asked = await _asked(request)
    return _json(await asked.batches.create(parse(await read_body(request), BatchRequest), asked.tenant))


async def _batches(request: Request) -> Response:
    asked = await _asked(request)
    found = await asyncio.to_thread(asked.store.batches.of, asked.tenant)
    return _json(files.page(request, found, lambda batch: batch.id, shown))


async def _batch(request: Request) -> Response:
    asked = await _asked(request)
    return _json(shown(await asyncio.to_thread(asked.store.batches.get, asked.tenant, asked.id)))


async def _cancel(request: Request) -> Response:
    asked = await _asked(request)
    return _json(await asked.batches.cancel(asked.tenant, asked.id))


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
