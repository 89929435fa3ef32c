"""The port for administration: what the server is doing, new keys, and its end. Every route asks for an admin key."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from penstock.base import ConfigError
from penstock.serving.app import Routes, application, metrics, status
from penstock.serving.context import Context, context_of
from penstock.serving.edge import as_json
from penstock.serving.errors import HTTPError
from penstock.serving.model_routes import load_model, models_told, unload_model


def build_admin(context: Context, *, hosts: frozenset[str] | None = None) -> ASGIApp:
    """The application behind ``--admin-port``. ``hosts`` as for ``build_app``."""
    return application(ROUTES, context, hosts)


async def _reload(request: Request) -> Response:
    """The file of keys is read again. A broken one is an error, and the keys from before stay."""
    try:
        return as_json({"keys": context_of(request).gate.reload()})
    except ConfigError as error:  # its cause is the operator's, who is asking
        raise HTTPError(error.code, error.what, why=error.why, fix=error.fix, status=409) from None


async def _drain(request: Request) -> Response:
    """As SIGTERM: nothing new is taken, what runs may finish, and the server ends."""
    context = context_of(request)
    context.stop.set()
    return as_json({"draining": True, "requests": context.gate.admission.running})


ROUTES: Routes = {
    "/metrics": ("admin", metrics),
    "/status": ("admin", status),
    "/models": ("admin", models_told),
    "/models/load": ("admin", load_model, "POST"),
    "/models/unload": ("admin", unload_model, "POST"),
    "/reload": ("admin", _reload, "POST"),
    "/drain": ("admin", _drain, "POST"),
}
