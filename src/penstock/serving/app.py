"""The application: routes over one engine, wrapped in the edge."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
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

from penstock.base import PenstockError, env
from penstock.fleet import Admission
from penstock.llm import AsyncLLM
from penstock.serving import durable
from penstock.serving.batch_run import Answerer
from penstock.serving.batches import Batches
from penstock.serving.chat import ChatTask
from penstock.serving.completions import CompletionTask
from penstock.serving.context import Context, context_of, engine_stopped, shutting_down
from penstock.serving.dashboard import PAGES
from penstock.serving.edge import Edge, as_json, body_of, off_loop, parse
from penstock.serving.errors import (
    HTTPError,
    on_disconnect,
    on_http_exception,
    on_other_exception,
    on_penstock_error,
)
from penstock.serving.gate import Access, Caller, Gate, current, queue_budget
from penstock.serving.history import finished
from penstock.serving.limits import MAX_SHOWN
from penstock.serving.messages import EVENTS, CountRequest, MessagesRequest, MessagesTask, count_tokens
from penstock.serving.metrics import Metrics, QueueCollector
from penstock.serving.requestlog import RequestLog
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
Endpoint = Callable[[Request], Awaitable[ASGIApp]]
Routes = Mapping[str, tuple[Access, Endpoint] | tuple[Access, Endpoint, str]]
"""By path: what it asks of its caller where keys are set, who answers, and to which methods (GET)."""
_log = logging.getLogger(__name__)


class Task(Protocol):
    """An admitted request, answered in one of two ways."""

    async def whole(self) -> object: ...

    def chunks(self) -> AsyncGenerator[object, None]: ...


def build_app(
    llm: AsyncLLM,
    store: Path | None = None,
    *,
    hosts: frozenset[str] | None = None,
    gate: Gate | None = None,
    log: RequestLog | None = None,
) -> tuple[ASGIApp, Context]:
    """The application, and what whoever runs it needs to end it in good order.

    Args:
        store: folder of uploaded files and batches; the user's own by default.
        hosts: names a Host header may carry; None for any.
        gate: who may use it; by default anybody, within the default budget.
        log: has a line for each request.
    """
    engine = llm.engine
    metrics = Metrics(engine.service.status, frozenset(ROUTES))
    gate = gate or Gate(Admission(queue_budget(engine)))
    metrics.registry.register(QueueCollector(gate.admission, log))
    context = Context(llm=llm, metrics=metrics, gate=gate, name=engine.name, created=int(time.time()), log=log)
    context.batches = Batches(context, store or env.data_folder() / "store", _in_batches())
    return application(ROUTES, context, hosts), context


def application(routes: Routes, context: Context, hosts: frozenset[str] | None) -> ASGIApp:
    """Routes that each ask of the caller what they declare, and the edge around them."""
    inner = Starlette(
        routes=[_route(path, *rest) for path, rest in routes.items()],
        exception_handlers={
            PenstockError: on_penstock_error,
            ClientDisconnect: on_disconnect,
            HTTPException: on_http_exception,
            Exception: on_other_exception,
        },
    )
    inner.state.context = context
    inner.router.redirect_slashes = False  # a redirection would repeat whatever Host the client sent
    public = frozenset(path for path, (access, *_) in routes.items() if access == "public")
    return Edge(inner, context, hosts=hosts, public=public)


def _route(path: str, access: Access, endpoint: Endpoint, method: str = "GET") -> Route:
    """One that its endpoint's own guard keeps, whatever path led to it."""

    async def guarded(request: Request) -> ASGIApp:
        current.get().require(access)
        return await endpoint(request)

    return Route(path, guarded, methods=method.split())


def _in_batches() -> dict[str, Answerer]:
    """What may stand in a batch."""

    def generation(shape: type[G], prepare: Callable[[G, Context], Awaitable[Task]]) -> Answerer:
        async def answer(asked: G, context: Context) -> object:
            return await (await prepare(asked, context)).whole()

        return Answerer(functools.partial(_decode, shape=shape), answer)

    def vectors(shape: type[R], answer: Callable[[R, Context], Awaitable[object]]) -> Answerer:
        return Answerer(functools.partial(_decode, shape=shape), answer)

    async def response(asked: ResponsesRequest, context: Context) -> ResponseTask:
        if asked.store:
            fix = "leave it out: the answer is in the output file"
            raise HTTPError("invalid_parameter", "store cannot be used in a batch", fix=fix, param="store")
        asked.store = False
        return await ResponseTask.prepare(asked, context)

    return {
        "/v1/completions": generation(CompletionRequest, CompletionTask.prepare),
        "/v1/chat/completions": generation(ChatRequest, ChatTask.prepare),
        "/v1/responses": generation(ResponsesRequest, response),
        "/v1/embeddings": vectors(EmbeddingRequest, embeddings),
        "/v1/score": vectors(ScoreRequest, scores),
        "/v1/rerank": vectors(RerankRequest, ranking),
    }


async def _completions(request: Request) -> Response | EventStream:
    return await _generate(request, CompletionRequest, CompletionTask.prepare)


async def _chat(request: Request) -> Response | EventStream:
    return await _generate(request, ChatRequest, ChatTask.prepare)


async def _responses(request: Request) -> Response | EventStream:
    return await _generate(request, ResponsesRequest, ResponseTask.prepare, NAMED)


async def _response(request: Request) -> Response:
    stored, identifier = context_of(request).responses, request.path_params["response"]
    if request.method == "DELETE":
        stored.delete(identifier)
        return as_json({"id": identifier, "object": "response", "deleted": True})
    return as_json(stored.get(identifier).response)


async def _response_items(request: Request) -> Response:
    given = context_of(request).responses.get(request.path_params["response"]).given
    data = [{"id": f"item_{i}", **item} for i, item in enumerate(given)]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return as_json({"object": "list", "data": data, "has_more": False, **ends})


async def _messages(request: Request) -> Response | EventStream:
    return await _generate(request, MessagesRequest, MessagesTask.prepare, EVENTS)


async def _count_tokens(request: Request) -> Response:
    return await _vectors(request, CountRequest, count_tokens)


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
        return as_json(await unless_disconnected(request.receive, task.whole()))
    chunks = task.chunks()
    return EventStream(await unless_disconnected(request.receive, anext(chunks)), chunks, dialect)


async def _vectors(request: Request, shape: type[R], answer: Callable[[R, Context], Awaitable[object]]) -> Response:
    context, asked = await _admitted(request, shape)
    return as_json(await unless_disconnected(request.receive, context.until_aborted(answer(asked, context))))


async def _admitted(request: Request, shape: type[R]) -> tuple[Context, R]:
    context = context_of(request)
    context.admit(None)
    current.get().enter()
    async with body_of(request) as body:
        await context.turnstile.enter()
        asked = await off_loop(len(body), functools.partial(_decode, body, shape))
    context.admit(asked.model)
    current.get().model = context.name
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
    return as_json(ModelList([_served(context_of(request))]))


async def _model(request: Request) -> Response:
    context = context_of(request)
    context.admit(request.path_params["model"])
    return as_json(_served(context))


def _served(context: Context) -> Model:
    return Model(context.name, context.created, context.llm.engine.config.max_model_len)


async def _live(_: Request) -> Response:
    """The process answers. Nothing else is asked, so that a busy or broken engine is not restarted by mistake."""
    return PlainTextResponse("ok\n")


async def _ready(request: Request) -> Response:
    """New requests are welcome. Raises Unavailable."""
    context = context_of(request)
    if context.draining or not context.llm.engine.service.alive:
        raise shutting_down() if context.draining else engine_stopped()
    return PlainTextResponse("ok\n")


async def _ready_model(request: Request) -> Response:
    """New requests for one model are."""
    context_of(request).admit(request.path_params["model"])
    return await _ready(request)


async def metrics(request: Request) -> Response:
    return Response(context_of(request).metrics.expose(), media_type=CONTENT_TYPE_LATEST)


async def status(request: Request) -> Response:
    """What the server is doing, for people and for ``penstock ps``."""
    context = context_of(request)
    engine, admission = context.llm.engine.service.status(), context.gate.admission
    return as_json(
        {
            "model": context.name,
            "draining": context.draining,
            "alive": context.llm.engine.service.alive,
            "queue": {"requests": admission.running, "tokens": admission.held, "tokens_limit": admission.budget},
            "requests": [_progress(caller) for caller in sorted(context.gate.live, key=_arrival)[:MAX_SHOWN]],
            "tenants": {name or "-": count for name, count in admission.held_by().items() if count},
            "engine": {
                "running": engine.running,
                "waiting": engine.waiting,
                "kv_blocks": engine.blocks_total,
                "kv_blocks_used": engine.blocks_used,
                "steps": engine.counters.steps,
                "prompt_tokens": engine.counters.prompt_tokens,
                "generated_tokens": engine.counters.generated_tokens,
                "prefix_hit_tokens": engine.counters.prefix_hit_tokens,
                "preemptions": engine.counters.preemptions,
            },
        }
    )


def _arrival(caller: Caller) -> float:
    return caller.arrived


def _progress(caller: Caller) -> dict[str, object]:
    """A request before its first token has not been computed yet, or its prompt is being computed."""
    now = time.monotonic()
    return {
        "id": caller.id,
        "tenant": caller.tenant or None,
        "phase": "upload" if caller.model is None else "prompt" if caller.first_token is None else "decode",
        "seconds": round(now - caller.arrived, 3),
        "prompt_tokens": caller.prompt_tokens,
        "completion_tokens": caller.completion_tokens,
    }


ROUTES: Routes = {
    "/v1/completions": ("inference", _completions, "POST"),
    "/v1/chat/completions": ("inference", _chat, "POST"),
    "/v1/responses": ("inference", _responses, "POST"),
    "/v1/responses/{response}": ("inference", _response, "GET DELETE"),
    "/v1/responses/{response}/input_items": ("inference", _response_items),
    "/v1/messages": ("inference", _messages, "POST"),
    "/v1/messages/count_tokens": ("inference", _count_tokens, "POST"),
    "/v1/embeddings": ("inference", _embeddings, "POST"),
    "/v1/score": ("inference", _score, "POST"),
    "/v1/rerank": ("inference", _rerank, "POST"),
    "/tokenize": ("inference", _tokenize, "POST"),
    "/detokenize": ("inference", _detokenize, "POST"),
    "/v1/files": ("inference", durable.files_of_all, "GET POST"),
    "/v1/files/{id}": ("inference", durable.one_file, "GET DELETE"),
    "/v1/files/{id}/content": ("inference", durable.file_content),
    "/v1/batches": ("inference", durable.batches_of_all, "GET POST"),
    "/v1/batches/{id}": ("inference", durable.one_batch),
    "/v1/batches/{id}/cancel": ("inference", durable.cancel_batch, "POST"),
    "/v1/models": ("inference", _models),
    "/v1/models/{model:path}": ("inference", _model),
    "/live": ("public", _live),
    "/ready": ("inference", _ready),
    "/ready/{model:path}": ("inference", _ready_model),
    "/health": ("inference", _ready),
    "/metrics": ("admin", metrics),
    "/status": ("admin", status),
    "/requests": ("inference", finished),
    **PAGES,
}
