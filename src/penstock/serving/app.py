"""The application: routes over one engine, wrapped in the edge."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from penstock.base import PenstockError
from penstock.llm import AsyncLLM
from penstock.serving.batch_run import Endpoint
from penstock.serving.batches import Batches
from penstock.serving.chat import ChatTask
from penstock.serving.completions import CompletionTask
from penstock.serving.context import Context, engine_stopped, shutting_down
from penstock.serving.durable import batch_routes
from penstock.serving.edge import Edge, off_loop, parse, read_body
from penstock.serving.errors import (
    error_response,
    on_disconnect,
    on_http_exception,
    on_other_exception,
    on_penstock_error,
)
from penstock.serving.metrics import Metrics
from penstock.serving.schemas import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    Model,
    ModelList,
    ModelRequest,
    refuse_unsupported,
    unknown_fields,
)
from penstock.serving.sse import EventStream, unless_disconnected
from penstock.serving.vectors import EmbeddingRequest, RerankRequest, ScoreRequest, embeddings, ranking, scores

G = TypeVar("G", bound=GenerationRequest)
R = TypeVar("R", bound=ModelRequest)
_log = logging.getLogger(__name__)


class Task(Protocol):
    """An admitted request, answered in one of two ways."""

    async def whole(self) -> object: ...

    def chunks(self) -> AsyncGenerator[object, None]: ...


def build_app(
    llm: AsyncLLM, *, hosts: frozenset[str] | None = None, store: Path | None = None
) -> tuple[ASGIApp, Context]:
    """The application, and what whoever runs it needs to end it in good order.

    Args:
        hosts: names a Host header may carry; None for any.
        store: folder of uploaded files and batches; without one they are not served.
    """
    engine = llm.engine
    routes = [
        Route("/v1/completions", _completions, methods=["POST"]),
        Route("/v1/chat/completions", _chat, methods=["POST"]),
        Route("/v1/embeddings", _embeddings, methods=["POST"]),
        Route("/v1/score", _score, methods=["POST"]),
        Route("/v1/rerank", _rerank, methods=["POST"]),
        Route("/v1/models", _models),
        Route("/v1/models/{model:path}", _model),
        Route("/live", _live),
        Route("/ready", _ready),
        Route("/health", _ready),
        Route("/metrics", _metrics),
        *(batch_routes() if store else ()),
    ]
    metrics = Metrics(engine.service.status, frozenset(route.path for route in routes))
    context = Context(llm=llm, metrics=metrics, name=engine.name, created=int(time.time()))
    if store is not None:
        context.batches = Batches(context, store, _endpoints())
    inner = Starlette(
        routes=routes,
        exception_handlers={
            PenstockError: on_penstock_error,
            ClientDisconnect: on_disconnect,
            HTTPException: on_http_exception,
            Exception: on_other_exception,
        },
    )
    inner.state.context = context
    return Edge(inner, hosts, metrics.count), context


def _endpoints() -> dict[str, Endpoint]:
    """What may stand in a batch."""

    def generation(shape: type[G], prepare: Callable[[G, Context], Awaitable[Task]]) -> Endpoint:
        async def answer(asked: G, context: Context) -> object:
            return await (await prepare(asked, context)).whole()

        return Endpoint(functools.partial(_decode, shape=shape), answer)

    def vectors(shape: type[R], answer: Callable[[R, Context], Awaitable[object]]) -> Endpoint:
        return Endpoint(functools.partial(_decode, shape=shape), answer)

    return {
        "/v1/completions": generation(CompletionRequest, CompletionTask.prepare),
        "/v1/chat/completions": generation(ChatRequest, ChatTask.prepare),
        "/v1/embeddings": vectors(EmbeddingRequest, embeddings),
        "/v1/score": vectors(ScoreRequest, scores),
        "/v1/rerank": vectors(RerankRequest, ranking),
    }


def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


async def _completions(request: Request) -> Response | EventStream:
    return await _generate(request, CompletionRequest, CompletionTask.prepare)


async def _chat(request: Request) -> Response | EventStream:
    return await _generate(request, ChatRequest, ChatTask.prepare)


async def _embeddings(request: Request) -> Response:
    return await _vectors(request, EmbeddingRequest, embeddings)


async def _score(request: Request) -> Response:
    return await _vectors(request, ScoreRequest, scores)


async def _rerank(request: Request) -> Response:
    return await _vectors(request, RerankRequest, ranking)


async def _generate(
    request: Request, shape: type[G], prepare: Callable[[G, Context], Awaitable[Task]]
) -> Response | EventStream:
    context, asked = await _admitted(request, shape)
    task = await prepare(asked, context)
    if not asked.stream:
        return _json(await unless_disconnected(request.receive, task.whole()))
    chunks = task.chunks()
    return EventStream(await unless_disconnected(request.receive, anext(chunks)), chunks)


async def _vectors(request: Request, shape: type[R], answer: Callable[[R, Context], Awaitable[object]]) -> Response:
    context, asked = await _admitted(request, shape)
    return _json(await unless_disconnected(request.receive, context.until_aborted(answer(asked, context))))


async def _admitted(request: Request, shape: type[R]) -> tuple[Context, R]:
    context = _context(request)
    body = await read_body(request)
    asked = await off_loop(len(body), functools.partial(_decode, body, shape))
    context.admit(asked.model)
    return context, asked


def _decode(body: bytes, shape: type[R]) -> R:
    asked = parse(body, shape)
    asked.check()
    fields = parse(body, dict[str, msgspec.Raw])
    refuse_unsupported(fields, shape)
    if unknown := unknown_fields(fields, shape):
        _log.warning("a request carries unknown fields, which are ignored: %.300r", unknown)
    return asked


async def _models(request: Request) -> Response:
    return _json(ModelList([_served(_context(request))]))


async def _model(request: Request) -> Response:
    context = _context(request)
    context.admit(request.path_params["model"])
    return _json(_served(context))


def _served(context: Context) -> Model:
    return Model(context.name, context.created, context.llm.engine.config.max_model_len)


async def _live(_: Request) -> Response:
    """The process answers. Nothing else is asked, so that a busy or broken engine is not restarted by mistake."""
    return PlainTextResponse("ok\n")


async def _ready(request: Request) -> Response:
    """New requests are welcome."""
    context = _context(request)
    if context.draining or not context.llm.engine.service.alive:
        return error_response(shutting_down() if context.draining else engine_stopped())
    return PlainTextResponse("ok\n")


async def _metrics(request: Request) -> Response:
    return Response(_context(request).metrics.expose(), media_type=CONTENT_TYPE_LATEST)


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
