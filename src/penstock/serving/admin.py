"""The port for administration: what the server is doing, new keys, and its end. Every route asks for an admin key but
the files of the dashboard, whose live view and inspector have here all that they ask for.
"""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from penstock.base import ConfigError
from penstock.serving.app import application, metrics
from penstock.serving.chrome import trace_file
from penstock.serving.context import Context, context_of
from penstock.serving.dashboard import PAGES
from penstock.serving.edge import as_json
from penstock.serving.errors import HTTPError
from penstock.serving.history import finished, texts_of
from penstock.serving.model_routes import load_model, models_listed, models_told, unload_model
from penstock.serving.openapi import openapi
from penstock.serving.operations import Routes, operation
from penstock.serving.status import status
from penstock.serving.steps import engine_view


class Reloaded(msgspec.Struct):
    keys: int


class Draining(msgspec.Struct):
    requests: int
    draining: bool = True


def build_admin(context: Context, *, hosts: frozenset[str] | None = None) -> ASGIApp:
    """The application behind ``--admin-port``. ``hosts`` as for ``build_app``."""
    return application(ROUTES, context, hosts)


@operation("Read the file of keys again.", method="POST", gives=Reloaded)
async def _reload(request: Request) -> Response:
    """The file of keys is read again. A broken one is an error, and the keys from before stay."""
    try:
        return as_json(Reloaded(context_of(request).gate.reload()))
    except ConfigError as error:  # its cause is the operator's, who is asking
        raise HTTPError(error.code, error.what, why=error.why, fix=error.fix, status=409) from None


@operation("End in good order, as SIGTERM does.", method="POST", gives=Draining)
async def _drain(request: Request) -> Response:
    """As SIGTERM: nothing new is taken, what runs may finish, and the server ends."""
    context = context_of(request)
    context.stop.set()
    return as_json(Draining(context.gate.admission.running))


ROUTES: Routes = {
    "/openapi.json": ("admin", openapi),
    "/metrics": ("admin", metrics),
    "/status": ("admin", status),
    "/debug/engine": ("admin", engine_view),
    "/debug/trace": ("admin", trace_file),
    "/models": ("admin", models_told),
    "/models/load": ("admin", load_model, "POST"),
    "/models/unload": ("admin", unload_model, "POST"),
    "/reload": ("admin", _reload, "POST"),
    "/drain": ("admin", _drain, "POST"),
    "/v1/models": ("admin", models_listed),
    "/requests": ("admin", finished),
    "/requests/{id}": ("admin", texts_of),
    **PAGES,
}
