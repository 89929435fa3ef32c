"""For whoever runs a server of several models: how each of them is, and to bring one in or out of memory by hand."""

from __future__ import annotations

import time
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from penstock.base import Unavailable
from penstock.serving.context import context_of
from penstock.serving.edge import as_json, parse, read_body
from penstock.serving.limits import MAX_MODEL_NAME
from penstock.serving.models import Models, Served


class ModelChoice(msgspec.Struct, kw_only=True):
    """POST /models/load and /models/unload"""

    model: Annotated[str, Meta(max_length=MAX_MODEL_NAME)]


async def models_told(request: Request) -> Response:
    """GET /models"""
    models = context_of(request).models
    return as_json({"models": [told(models, model) for model in models.all.values()], "max_loaded": models.policy.room})


async def load_model(request: Request) -> Response:
    """It comes as soon as there is room, and another leaves for it; answered at once, with how it is now."""
    models, model = await _chosen(request)
    models.load(model)
    return as_json(told(models, model))


async def unload_model(request: Request) -> Response:
    """It leaves once what uses it has ended; answered at once. A request that names it later brings it back."""
    models, model = await _chosen(request)
    models.unload(model)
    return as_json(told(models, model))


async def _chosen(request: Request) -> tuple[Models, Served]:
    """Raises HTTPError, as ``Context.admit``."""
    asked = parse(await read_body(request), ModelChoice)
    context = context_of(request)
    return context.models, context.admit(asked.model)


def told(models: Models, model: Served) -> dict[str, Any]:
    """How a model is, for people and programs."""
    alive, status = models.ready(model), model.status()
    resident, now = models.policy.models[model.name], time.monotonic()
    waiting = [ticket.asked for ticket in models.policy.waiting if ticket.model == model.name]
    return {
        "name": model.name,
        "aliases": list(model.aliases),
        "state": resident.state,
        "alive": alive,
        "progress": progress_of(models, model),
        "pinned": resident.stay.pinned,
        "keep_alive": resident.stay.keep_alive,
        "idle_seconds": None if resident.running or model.llm is None else round(now - resident.used, 3),
        "requests": {"running": resident.running, "waiting": len(waiting)},
        "waited_seconds": round(now - min(waiting), 3) if waiting else 0.0,
        "kv_blocks": status.blocks_total,
        "kv_blocks_used": status.blocks_used,
        "failure": None if resident.error is None else resident.error.code,
        "retry_seconds": None if resident.error is None else round(max(0.0, resident.again - now), 3),
    }


def progress_of(models: Models, model: Served) -> float | None:
    """Share of it that has been loaded; None if it is not being loaded. What a hub has to send first counts as none."""
    loading = models.policy.models[model.name].state == "loading"
    return None if not loading else 0.0 if model.service is None else round(model.service.progress, 3)


def not_in_memory(models: Models, model: Served) -> Unavailable:
    resident = models.policy.models[model.name]
    failure = "" if resident.error is None else f"; the last try failed with {resident.error.code}"
    progress = progress_of(models, model)
    share = "" if progress is None else f", {progress:.0%} of it is there"
    fix = "a request that names it loads it, and waits"
    return Unavailable(
        "not_in_memory",
        f"The model {model.name!r} is not in memory",
        why=f"it is {resident.state}{share}{failure}",
        fix=fix,
    )
