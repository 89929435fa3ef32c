"""GET /ready and /health: whether the server can answer, and how each model is."""

from __future__ import annotations

from importlib import metadata
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from penstock.base import Unavailable
from penstock.serving.context import Context, context_of
from penstock.serving.edge import as_json
from penstock.serving.errors import Fault, body_of, headers_of
from penstock.serving.model_routes import check_ready, not_in_memory, progress_of
from penstock.serving.models import Models, Served
from penstock.serving.operations import PLAIN_TEXT, operation

Status = Literal["ready", "loading", "draining", "stopped"]


class ModelHealth(msgspec.Struct, kw_only=True):
    """``alive``: it can compute now. ``progress``: share of it that has been loaded."""

    name: str
    state: str
    alive: bool
    progress: float | None
    failure: str | None


class Health(msgspec.Struct, kw_only=True, omit_defaults=True):
    """``error``: why new requests are not welcome, with status 503."""

    status: Status
    version: str
    models: list[ModelHealth]
    error: Fault | None = None


@operation("Whether new requests are welcome.", gives=PLAIN_TEXT)
async def ready(request: Request) -> Response:
    """Raises as ``check_welcome``."""
    check_welcome(context_of(request))
    return PlainTextResponse("ok\n")


def check_welcome(context: Context) -> None:
    """Raises Unavailable: as ``check_ready``, and (not_in_memory) the first models are not there yet."""
    models = context.models
    if context.starting and not context.draining:
        coming = (each for each in models.all.values() if models.policy.models[each.name].state == "loading")
        raise not_in_memory(models, next(coming, models.first))
    check_ready(context)


@operation("How the server and its models are.", gives=Health)
async def health(request: Request) -> Response:
    """200 and 503 as /ready."""
    context = context_of(request)
    models = [_health(context.models, model) for model in context.models.all.values()]
    told = Health(status="ready", version=metadata.version("penstock"), models=models)
    try:
        check_welcome(context)
    except Unavailable as error:
        told.status, told.error = _status(context), body_of(error).error
        return Response(msgspec.json.encode(told), error.status, headers_of(error), "application/json")
    return as_json(told)


def _status(context: Context) -> Status:
    """Of one that is not ready."""
    return "draining" if context.draining else "loading" if context.starting else "stopped"


def _health(models: Models, model: Served) -> ModelHealth:
    alive, resident = models.ready(model), models.policy.models[model.name]
    return ModelHealth(
        name=model.name,
        state=resident.state,
        alive=alive,
        progress=progress_of(models, model),
        failure=None if resident.error is None else resident.error.code,
    )
