"""For whoever uses or runs a server of several models: how each is, and to bring one in or out of memory by hand."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from penstock.base import Unavailable
from penstock.core.service import engine_stopped
from penstock.serving.context import Context, context_of, shutting_down
from penstock.serving.edge import as_json, body_of, off_loop, parse
from penstock.serving.errors import invalid
from penstock.serving.files import limit_of
from penstock.serving.gate import Caller
from penstock.serving.limits import MAX_MODEL_NAME
from penstock.serving.models import Models, Served
from penstock.serving.operations import PLAIN_TEXT, operation

ANTHROPIC = "anthropic-version"
"""The header that Anthropic's clients send with every request."""

SHOWN_MODELS, MAX_MODELS = 20, 1000
"""On a page of a list for them: by default, and at most."""


class Model(msgspec.Struct):
    id: str
    created: int
    max_model_len: int | None
    aliases: list[str]
    state: str
    object: str = "model"
    owned_by: str = "penstock"


class ModelList(msgspec.Struct):
    data: list[Model]
    object: str = "list"


class ModelChoice(msgspec.Struct, kw_only=True):
    """POST /models/load and /models/unload"""

    model: Annotated[str, Meta(max_length=MAX_MODEL_NAME)]


class Users(msgspec.Struct, kw_only=True):
    """Requests to a model: those that use it, and those that wait until it is there."""

    running: int
    waiting: int


class ModelStatus(msgspec.Struct, kw_only=True):
    """``keep_alive``: seconds; null for ever. ``retry_seconds``: until one that failed is tried again."""

    name: str
    aliases: list[str]
    state: str
    alive: bool
    progress: float | None
    pinned: bool
    keep_alive: float | None
    idle_seconds: float | None
    requests: Users
    waited_seconds: float
    kv_blocks: int
    kv_blocks_used: int
    failure: str | None
    retry_seconds: float | None


class AllModels(msgspec.Struct, kw_only=True):
    models: list[ModelStatus]
    max_loaded: int


class AnthropicModel(msgspec.Struct, kw_only=True):
    """As Anthropic's API describes one, to clients that send the header ``anthropic-version``."""

    id: str
    display_name: str
    created_at: str
    max_input_tokens: int | None
    max_tokens: int | None
    lifecycle: str = "active"
    type: str = "model"


class ModelsQuery(msgspec.Struct, kw_only=True):
    """Read for those clients alone: others are told of all models."""

    limit: Annotated[int, Meta(ge=1, le=MAX_MODELS)] | None = None
    after_id: str | None = None
    before_id: str | None = None


class AnthropicModels(msgspec.Struct, kw_only=True):
    data: list[AnthropicModel]
    has_more: bool = False
    first_id: str | None
    last_id: str | None


@operation("List the models that are served.", query=ModelsQuery, gives=(ModelList, AnthropicModels))
async def models_listed(request: Request) -> Response:
    """Raises HTTPError: (invalid_parameter)."""
    models = context_of(request).models
    each = [_listed(models, model) for model in models.all.values()]
    limit = limit_of(request.query_params, SHOWN_MODELS, MAX_MODELS)
    if ANTHROPIC not in request.headers:
        return as_json(ModelList(each))
    return as_json(_page(each, limit, request.query_params))


def _page(models: Sequence[Model], limit: int, query: Mapping[str, str]) -> AnthropicModels:
    """What follows ``after_id``, or the end of what comes before ``before_id``, as Anthropic's API pages.

    Raises:
        HTTPError: (invalid_parameter) one of them names no model.
    """
    ids, at = [model.id for model in models], {}
    for name in {"after_id", "before_id"}.intersection(query):
        if query[name] not in ids:
            raise invalid(name, "it names no model of this server")
        at[name] = ids.index(query[name])
    rest = models[at.get("after_id", -1) + 1 : at.get("before_id")]
    shown = [*map(_to_anthropic, rest[-limit:] if "before_id" in at else rest[:limit])]
    first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
    return AnthropicModels(data=shown, has_more=len(shown) < len(rest), first_id=first, last_id=last)


@operation("Describe a model.", gives=(Model, AnthropicModel))
async def described(request: Request) -> Response:
    context = context_of(request)
    model = _listed(context.models, context.admit(request.path_params["model"]))
    return as_json(_to_anthropic(model) if ANTHROPIC in request.headers else model)


def _to_anthropic(model: Model) -> AnthropicModel:
    longest = model.max_model_len
    created = datetime.fromtimestamp(model.created, UTC).isoformat().replace("+00:00", "Z")
    return AnthropicModel(
        id=model.id, display_name=model.id, created_at=created, max_input_tokens=longest, max_tokens=longest
    )


def _listed(models: Models, model: Served) -> Model:
    config = model.config if model.llm is None else model.llm.engine.config
    state = models.policy.models[model.name].state
    return Model(model.name, model.created, config.max_model_len, list(model.aliases), state)


@operation("Whether a model can compute now.", gives=PLAIN_TEXT)
async def model_ready(request: Request) -> Response:
    """One model can compute now. Raises Unavailable."""
    check_model_ready(context_of(request), request.path_params["model"])
    return PlainTextResponse("ok\n")


def check_ready(context: Context) -> None:
    """Raises Unavailable: (shutting_down), (engine_stopped) no model can compute or be loaded."""
    if context.draining or not any(map(context.models.may_come, context.models.all.values())):
        raise shutting_down() if context.draining else engine_stopped()


def check_model_ready(context: Context, name: str) -> None:
    """Raises HTTPError, as ``Context.admit``, and Unavailable: (engine_stopped), (not_in_memory)."""
    model = context.admit(name)
    if not context.models.ready(model):
        raise engine_stopped() if model.llm is not None else not_in_memory(context.models, model)


def in_memory(context: Context, name: str | None) -> Context:
    """The same for a model that is in memory now; the first such one where none is named.

    Raises:
        HTTPError: as ``Models.find``.
        Unavailable: (not_in_memory).
    """
    models = context.models
    there = (model for model in models.all.values() if model.llm is not None)
    model = next(there, models.first) if name is None else models.find(name)
    if model.llm is None:
        raise not_in_memory(models, model)
    return context.of(model)


@operation("How each model is, and how many may be in memory.", gives=AllModels)
async def models_told(request: Request) -> Response:
    """GET /models"""
    models = context_of(request).models
    each = [told(models, model) for model in models.all.values()]
    return as_json(AllModels(models=each, max_loaded=models.policy.room))


@operation("Bring a model into memory.", takes=ModelChoice, gives=ModelStatus)
async def load_model(request: Request) -> Response:
    """It comes as soon as there is room, and another leaves for it; answered at once, with how it is now."""
    models, model = await _chosen(request)
    models.load(model)
    return as_json(told(models, model))


@operation("Take a model out of memory.", takes=ModelChoice, gives=ModelStatus)
async def unload_model(request: Request) -> Response:
    """It leaves once what uses it has ended; answered at once. A request that names it later brings it back."""
    models, model = await _chosen(request)
    models.unload(model)
    return as_json(told(models, model))


async def _chosen(request: Request) -> tuple[Models, Served]:
    """Raises HTTPError, as ``Context.admit``."""
    context = context_of(request)
    async with body_of(request) as body:
        asked = await off_loop(len(body), partial(parse, body, ModelChoice))
    return context.models, context.admit(asked.model)


def told(models: Models, model: Served) -> ModelStatus:
    """How a model is, for people and programs."""
    alive, status = models.ready(model), model.status()
    resident, now = models.policy.models[model.name], time.monotonic()
    return ModelStatus(
        name=model.name,
        aliases=list(model.aliases),
        state=resident.state,
        alive=alive,
        progress=progress_of(models, model),
        pinned=resident.stay.pinned,
        keep_alive=resident.keep_alive,
        idle_seconds=None if resident.running or model.llm is None else round(now - resident.used, 3),
        requests=Users(running=resident.running, waiting=len(resident.waiting)),
        waited_seconds=0.0 if resident.first is None else round(now - resident.first.asked, 3),
        kv_blocks=status.blocks_total,
        kv_blocks_used=status.blocks_used,
        failure=None if resident.error is None else resident.error.code,
        retry_seconds=None if resident.error is None else round(max(0.0, resident.again - now), 3),
    )


def progress_of(models: Models, model: Served) -> float | None:
    """Share of it that has been loaded; None if it is not being loaded. What a hub has to send first counts as none."""
    loading = models.policy.models[model.name].state == "loading"
    return None if not loading else 0.0 if model.service is None else round(model.service.progress, 3)


def awaited(models: Models, caller: Caller) -> str | None:
    """What a request is told that waits for its model; None if it does not wait for one.

    Empty while it may come out at any moment that the model cannot be had, which then is the status of the answer: it
    is being looked at, or nothing of it is in memory.
    """
    if not caller.waits or caller.model is None:
        return None
    progress = progress_of(models, models.all[caller.model])
    if models.policy.models[caller.model].checking or progress == 0.0:
        return ""
    return f"waiting for {caller.model}" if progress is None else f"loading {caller.model} {100 * progress:.0f} %"


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
