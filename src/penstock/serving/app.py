"""The application: routes over one engine, wrapped in the edge."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
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
from penstock.serving.chat import ChatTask
from penstock.serving.completions import CompletionTask
from penstock.serving.context import Context, engine_stopped, shutting_down
from penstock.serving.edge import Edge, off_loop, parse, read_body
from penstock.serving.errors import (
    error_response,
    log_fault,
    on_disconnect,
    on_http_exception,
    on_other_exception,
    on_penstock_error,
)
from penstock.serving.messages import EVENTS, CountRequest, MessagesRequest, MessagesTask, count_tokens, error_body
from penstock.serving.metrics import Metrics
from penstock.serving.responses import ResponsesRequest, ResponseTask
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
from penstock.serving.sse import NAMED, PLAIN, Dialect, EventStream, unless_disconnected
from penstock.serving.tokens import DetokenizeRequest, TokenizeRequest, detokenize, tokenize
from penstock.serving.vectors import EmbeddingRequest, RerankRequest, ScoreRequest, embeddings, ranking, scores

G = TypeVar("G", bound=GenerationRequest)
R = TypeVar("R", bound=ModelRequest)
_log = logging.getLogger(__name__)


class Task(Protocol):
    """An admitted request, answered in one of two ways."""

    async def whole(self) -> object: ...

    def chunks(self) -> AsyncGenerator[object, None]: ...


def build_app(llm: AsyncLLM, *, hosts: frozenset[str] | None = None) -> tuple[ASGIApp, Context]:
    """The application, and what whoever runs it needs to end it in good order.

    Args:
        hosts: names a Host header may carry; None for any.
    """
    engine = llm.engine
    routes = [
        Route("/v1/completions", _completions, methods=["POST"]),
        Route("/v1/chat/completions", _chat, methods=["POST"]),
        Route("/v1/responses", _responses, methods=["POST"]),
        Route("/v1/responses/{response}", _response),
        Route("/v1/responses/{response}", _delete_response, methods=["DELETE"]),
        Route("/v1/responses/{response}/input_items", _response_items),
        Route("/v1/messages", _messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", _count_tokens, methods=["POST"]),
        Route("/v1/embeddings", _embeddings, methods=["POST"]),
        Route("/v1/score", _score, methods=["POST"]),
        Route("/v1/rerank", _rerank, methods=["POST"]),
        Route("/tokenize", _tokenize, methods=["POST"]),
        Route("/detokenize", _detokenize, methods=["POST"]),
        Route("/v1/models", _models),
        Route("/v1/models/{model:path}", _model),
        Route("/live", _live),
        Route("/ready", _ready),
        Route("/health", _ready),
        Route("/metrics", _metrics),
    ]
    metrics = Metrics(engine.service.status, frozenset(route.path for route in routes))
    context = Context(llm=llm, metrics=metrics, name=engine.name, created=int(time.time()))
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


def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


async def _completions(request: Request) -> Response | EventStream:
    return await _generate(request, CompletionRequest, CompletionTask.prepare)


async def _chat(request: Request) -> Response | EventStream:
    return await _generate(request, ChatRequest, ChatTask.prepare)


async def _responses(request: Request) -> Response | EventStream:
    return await _generate(request, ResponsesRequest, ResponseTask.prepare, NAMED)


async def _response(request: Request) -> Response:
    return _json(_context(request).responses.get(request.path_params["response"]).response)


async def _delete_response(request: Request) -> Response:
    identifier = request.path_params["response"]
    _context(request).responses.delete(identifier)
    return _json({"id": identifier, "object": "response", "deleted": True})


async def _response_items(request: Request) -> Response:
    given = _context(request).responses.get(request.path_params["response"]).given
    data = [{"id": f"item_{i}", **item} for i, item in enumerate(given)]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return _json({"object": "list", "data": data, "has_more": False, **ends})


async def _messages(request: Request) -> Response | EventStream:
    try:
        return await _generate(request, MessagesRequest, MessagesTask.prepare, EVENTS)
    except PenstockError as error:
        return _anthropic_error(error)


async def _count_tokens(request: Request) -> Response:
    try:
        context, asked = await _admitted(request, CountRequest)
        return _json(await count_tokens(asked, context))
    except PenstockError as error:
        return _anthropic_error(error)


def _anthropic_error(error: PenstockError) -> Response:
    response = error_response(error)
    log_fault(error)
    headers = {name: value for name, value in response.headers.items() if name == "retry-after"}
    return Response(msgspec.json.encode(error_body(error)), error.status, headers, "application/json")


async def _embeddings(request: Request) -> Response:
    return await _vectors(request, EmbeddingRequest, embeddings)


async def _score(request: Request) -> Response:
    return await _vectors(request, ScoreRequest, scores)


async def _rerank(request: Request) -> Response:
    return await _vectors(request, RerankRequest, ranking)


async def _tokenize(request: Request) -> Response:
    return await _vectors(request, TokenizeRequest, tokenize)


async def _detokenize(request: Request) -> Response:
    return await _vectors(request, DetokenizeRequest, detokenize)


async def _generate(
    request: Request, shape: type[G], prepare: Callable[[G, Context], Awaitable[Task]], dialect: Dialect = PLAIN
) -> Response | EventStream:
    context, asked = await _admitted(request, shape)
    task = await prepare(asked, context)
    if not asked.stream:
        return _json(await unless_disconnected(request.receive, task.whole()))
    chunks = task.chunks()
    return EventStream(await unless_disconnected(request.receive, anext(chunks)), chunks, dialect)


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
