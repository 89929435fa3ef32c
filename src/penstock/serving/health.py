"""GET /ready and /health: whether new requests are welcome, and how each model is."""

from __future__ import annotations

from importlib import metadata
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from penstock.base import Unavailable
from penstock.serving.context import Context, context_of
from penstock.serving.edge import as_json
from penstock.serving.errors import Fault, body_of, headers_of
from penstock.serving.model_routes import check_ready, progress_of
from penstock.serving.models import Models, Served
from penstock.serving.operations import operation


class ModelHealth(msgspec.Struct, kw_only=True):
    """``alive``: it can compute now. ``progress``: share of it that has been loaded."""

    name: str
    state: str
    alive: bool
    progress: float | None
    failure: str | None


class Health(msgspec.Struct, kw_only=True, omit_defaults=True):
    """``error``: why new requests are not welcome, with status 503."""

    status: Literal["ready", "draining", "stopped"]
    version: str
    models: list[ModelHealth]
    error: Fault | None = None


@operation("How the server and its models are.", gives=Health)
async def health(request: Request) -> Response:
    """200 and 503 as /ready."""
    context = context_of(request)
    models = [_health(context.models, model) for model in context.models.all.values()]
    told = Health(status="ready", version=metadata.version("penstock"), models=models)
    try:
        check_ready(context)
    except Unavailable as error:
        told.status, told.error = _status(context), body_of(error).error
        return Response(msgspec.json.encode(told), error.status, headers_of(error), "application/json")
    return as_json(told)


def _status(context: Context) -> Literal["draining", "stopped"]:
    return "draining" if context.draining else "stopped"


def _health(models: Models, model: Served) -> ModelHealth:
    alive, resident = models.ready(model), models.policy.models[model.name]
    return ModelHealth(
        name=model.name,
        state=resident.state,
        alive=alive,
        progress=progress_of(models, model),
        failure=None if resident.error is None else resident.error.code,
    )
