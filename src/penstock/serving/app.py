"""The application: routes over the models of a server, wrapped in the edge."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive

from penstock.base import PenstockError, env
from penstock.fleet import Admission
from penstock.llm import AsyncLLM
from penstock.serving import conversations, durable
from penstock.serving.answers import answered
from penstock.serving.batch_table import Batch
from penstock.serving.batches import Batches
from penstock.serving.chat import ChatTask
from penstock.serving.chat_schemas import ChatChoice, ChatChunkChoice, ChatCompletion
from penstock.serving.chrome import trace_file
from penstock.serving.completions import CompletionTask
from penstock.serving.context import Context, context_of
from penstock.serving.dashboard import PAGES
from penstock.serving.decoding import Task, decode, in_batches
from penstock.serving.edge import Edge, body_of, off_loop, settle
from penstock.serving.errors import (
    AnthropicErrorBody,
    ErrorBody,
    on_disconnect,
    on_http_exception,
    on_other_exception,
    on_penstock_error,
)
from penstock.serving.gate import FIRST_TOKENS, Access, Gate, current, queue_budget
from penstock.serving.health import health, ready
from penstock.serving.history import finished, texts_of
from penstock.serving.kept import Kept
from penstock.serving.messages import (
    EVENTS,
    Counted,
    CountRequest,
    Message,
    MessageEvent,
    MessagesRequest,
    MessagesTask,
    count_tokens,
)
from penstock.serving.metrics import Metrics, QueueCollector
from penstock.serving.model_routes import (
    awaited,
    described,
    load_model,
    model_ready,
    models_listed,
    models_told,
    unload_model,
)
from penstock.serving.models import Models
from penstock.serving.openapi import openapi
from penstock.serving.operations import PLAIN_TEXT, Endpoint, Routes, operation
from penstock.serving.other_apis import other_apis
from penstock.serving.priorities import rank
from penstock.serving.requestlog import RequestLog
from penstock.serving.response_items import ResponseEvent, ResponseObject
from penstock.serving.response_schemas import InputTokens, InputTokensRequest, ResponsesRequest
from penstock.serving.responses import ResponseTask, input_tokens
from penstock.serving.schemas import (
    ChatRequest,
    Completion,
    CompletionRequest,
    GenerationRequest,
    ModelRequest,
)
from penstock.serving.sse import DONE, NAMED, PLAIN, Dialect, EventStream, FaultEvent, unless_disconnected
from penstock.serving.status import status
from penstock.serving.steps import engine_view
from penstock.serving.tokens import DetokenizeRequest, Prompt, TokenizeRequest, Tokens, detokenize, tokenize
from penstock.serving.vectors import (
    Embedding,
    EmbeddingRequest,
    Ranking,
    RerankRequest,
    Score,
    ScoreRequest,
    VectorList,
    embeddings,
    ranking,
    scores,
)

if TYPE_CHECKING:
    from penstock.serving.spans import Spans

G = TypeVar("G", bound=GenerationRequest)
R = TypeVar("R", bound=ModelRequest)
_log = logging.getLogger(__name__)


def build_app(
    models: Models | AsyncLLM,
    store: Path | None = None,
    *,
    hosts: frozenset[str] | None = None,
    gate: Gate | None = None,
    log: RequestLog | None = None,
    spans: Spans | None = None,
    apart: bool = False,
) -> tuple[ASGIApp, Context]:
    """The application, and what whoever runs it needs to end it in good order.

    Args:
        models: or one that is in memory.
        store: folder of files, batches, responses and conversations; the user's own by default.
        hosts: names a Host header may carry; None for any.
        gate: who may use it; by default anybody, within the default budget.
        log: has a line for each request.
        spans: sends one for each.
        apart: administration is spoken to elsewhere (``build_admin``), and its routes are not here.
    """
    settle(Batch)
    models = Models.of(models) if isinstance(models, AsyncLLM) else models
    metrics = Metrics(models.status, frozenset(ROUTES))
    gate = gate or Gate(Admission(sum(map(queue_budget, models.engines)) or FIRST_TOKENS))
    metrics.registry.register(QueueCollector(gate.admission, log, spans))
    context = Context(models=models, served=models.first, metrics=metrics, gate=gate, log=log, spans=spans)
    context.batches = Batches(context, store or env.data_folder() / "store", in_batches())
    context.kept = Kept(context.batches.store)
    routes = {path: route for path, route in ROUTES.items() if not apart or route[0] != "admin"}
    return application(routes, context, hosts), context


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
    inner.state.context, inner.state.routes = context, routes
    inner.router.redirect_slashes = False  # a redirection would repeat whatever Host the client sent
    public = frozenset(path for path, (access, *_) in routes.items() if access == "public")
    return Edge(inner, context, hosts=hosts, public=public)


def _route(path: str, access: Access, endpoint: Endpoint, method: str = "GET") -> Route:
    """One that its endpoint's own guard keeps, whatever path led to it."""

    async def guarded(request: Request) -> ASGIApp:
        current.get().require(access)
        return await endpoint(request)

    return Route(path, guarded, methods=method.split())


@operation(
    "Go on from prompts.",
    takes=CompletionRequest,
    gives=Completion,
    streams=(Completion, ErrorBody, DONE),
    example={"prompt": "Once upon a time", "max_tokens": 16},
)
async def _completions(request: Request) -> Response | EventStream:
    return await _generate(request, CompletionRequest, CompletionTask.prepare)


@operation(
    "Answer a conversation.",
    takes=ChatRequest,
    gives=ChatCompletion[ChatChoice],
    streams=(ChatCompletion[ChatChunkChoice], ErrorBody, DONE),
    example={"messages": [{"role": "user", "content": "Once upon a time"}], "max_tokens": 16},
)
async def _chat(request: Request) -> Response | EventStream:
    return await _generate(request, ChatRequest, ChatTask.prepare)


@operation(
    "Answer a conversation, in items.",
    takes=ResponsesRequest,
    gives=ResponseObject,
    streams=(ResponseEvent, FaultEvent),
    example={"input": "Once upon a time", "max_output_tokens": 16},
)
async def _responses(request: Request) -> Response | EventStream:
    return await _generate(request, ResponsesRequest, ResponseTask.prepare, NAMED)


@operation(
    "Count the tokens that a response would be given.",
    takes=InputTokensRequest,
    gives=InputTokens,
    example={"input": "Once upon a time"},
)
async def _input_tokens(request: Request) -> Response:
    return await _vectors(request, InputTokensRequest, input_tokens)


@operation(
    "Answer a conversation, as Anthropic's API.",
    takes=MessagesRequest,
    gives=Message,
    streams=(MessageEvent, AnthropicErrorBody),
    example={"messages": [{"role": "user", "content": "Once upon a time"}], "max_tokens": 16},
)
async def _messages(request: Request) -> Response | EventStream:
    return await _generate(request, MessagesRequest, MessagesTask.prepare, EVENTS)


@operation(
    "Count the tokens of a conversation.",
    takes=CountRequest,
    gives=Counted,
    example={"messages": [{"role": "user", "content": "Once upon a time"}]},
)
async def _count_tokens(request: Request) -> Response:
    return await _vectors(request, CountRequest, count_tokens)


@operation("Embed texts.", takes=EmbeddingRequest, gives=VectorList[Embedding], example={"input": ["Once", "upon"]})
async def _embeddings(request: Request) -> Response:
    return await _vectors(request, EmbeddingRequest, embeddings)


@operation(
    "Compare texts.",
    takes=ScoreRequest,
    gives=VectorList[Score],
    example={"text_1": "a cat", "text_2": ["a kitten", "a truck"]},
)
async def _score(request: Request) -> Response:
    return await _vectors(request, ScoreRequest, scores)


@operation(
    "Order documents by their score with a query.",
    takes=RerankRequest,
    gives=Ranking,
    example={"query": "a cat", "documents": ["a truck", "a kitten"]},
)
async def _rerank(request: Request) -> Response:
    return await _vectors(request, RerankRequest, ranking)


@operation("Text to token ids.", takes=TokenizeRequest, gives=Tokens, example={"prompt": "Once upon a time"})
async def _tokenize(request: Request) -> Response:
    return await _vectors(request, TokenizeRequest, tokenize)


@operation("Token ids to text.", takes=DetokenizeRequest, gives=Prompt, example={"tokens": [1, 2, 3]})
async def _detokenize(request: Request) -> Response:
    return await _vectors(request, DetokenizeRequest, detokenize)


async def _generate(
    request: Request, shape: type[G], prepare: Callable[[G, Context], Awaitable[Task]], dialect: Dialect = PLAIN
) -> Response | EventStream:
    asked, size = await _read(request, shape)

    async def prepared(receive: Receive | None) -> Task:
        return await prepare(asked, await _model_of(request, asked, size, receive))

    if not asked.stream:
        task = await prepared(request.receive)
        return await answered(await unless_disconnected(request.receive, task.whole()))

    async def begin() -> AsyncGenerator[object, None]:
        return (await prepared(None)).chunks()  # the stream itself watches for a client that goes away

    return EventStream(begin, dialect, functools.partial(awaited, context_of(request).models, current.get()))


async def _vectors(request: Request, shape: type[R], answer: Callable[[R, Context], Awaitable[object]]) -> Response:
    asked, size = await _read(request, shape)
    context = await _model_of(request, asked, size, request.receive)
    made = await unless_disconnected(request.receive, context.until_aborted(answer(asked, context)))
    return made if isinstance(made, Response) else await answered(made)


async def _read(request: Request, shape: type[R]) -> tuple[R, int]:
    """What is asked, and how many bytes its body had."""
    context = context_of(request)
    context.admit(None)
    current.get().enter()
    async with body_of(request) as body:
        await context.models.turnstile.enter()
        asked, size = await off_loop(len(body), functools.partial(decode, body, shape)), len(body)
    asked.model = request.path_params.get("model", asked.model)
    rank(asked, current.get().least_priority)
    return asked, size


async def _model_of(request: Request, asked: ModelRequest, size: int, receive: Receive | None) -> Context:
    """Arguments as of ``Context.use``."""
    context = context_of(request)
    if asked.only_parts and (view := context.of(context.admit(asked.model))).heeds and view.served.llm is None:
        return view
    return await context.use(asked.model, size, receive, asked.stays)


@operation("Whether the process answers.", gives=PLAIN_TEXT)
async def _live(_: Request) -> Response:
    """The process answers. Nothing else is asked, so that a busy or broken engine is not restarted by mistake."""
    return PlainTextResponse("ok\n")


@operation("Metrics, for Prometheus.", gives=PLAIN_TEXT)
async def metrics(request: Request) -> Response:
    return Response(context_of(request).metrics.expose(), media_type=CONTENT_TYPE_LATEST)


ROUTES: Routes = {
    "/v1/completions": ("inference", _completions, "POST"),
    "/v1/chat/completions": ("inference", _chat, "POST"),
    "/v1/responses": ("inference", _responses, "POST"),
    "/v1/responses/input_tokens": ("inference", _input_tokens, "POST"),
    "/v1/responses/{response}": ("inference", conversations.one_response, "GET DELETE"),
    "/v1/responses/{response}/input_items": ("inference", conversations.response_items),
    "/v1/conversations": ("tenant", conversations.conversations_of_all, "POST"),
    "/v1/conversations/{conversation}": ("tenant", conversations.one_conversation, "GET POST DELETE"),
    "/v1/conversations/{conversation}/items": ("tenant", conversations.conversation_items, "GET POST"),
    "/v1/conversations/{conversation}/items/{item}": ("tenant", conversations.one_item, "GET DELETE"),
    "/v1/messages": ("inference", _messages, "POST"),
    "/v1/messages/count_tokens": ("inference", _count_tokens, "POST"),
    "/v1/embeddings": ("inference", _embeddings, "POST"),
    "/v1/score": ("inference", _score, "POST"),
    "/v1/rerank": ("inference", _rerank, "POST"),
    "/tokenize": ("inference", _tokenize, "POST"),
    "/detokenize": ("inference", _detokenize, "POST"),
    "/v1/files": ("tenant", durable.files_of_all, "GET POST"),
    "/v1/files/{id}": ("tenant", durable.one_file, "GET DELETE"),
    "/v1/files/{id}/content": ("tenant", durable.file_content),
    "/v1/batches": ("tenant", durable.batches_of_all, "GET POST"),
    "/v1/batches/{id}": ("tenant", durable.one_batch),
    "/v1/batches/{id}/cancel": ("tenant", durable.cancel_batch, "POST"),
    "/v1/models": ("inference", models_listed),
    "/v1/models/{model:path}": ("inference", described),
    "/openapi.json": ("inference", openapi),
    "/live": ("public", _live),
    "/ready": ("inference", ready),
    "/ready/{model:path}": ("inference", model_ready),
    "/health": ("inference", health),
    "/metrics": ("admin", metrics),
    "/status": ("admin", status),
    "/models": ("admin", models_told),
    "/models/load": ("admin", load_model, "POST"),
    "/models/unload": ("admin", unload_model, "POST"),
    "/requests": ("inference", finished),
    "/requests/{id}": ("inference", texts_of),
    "/debug/engine": ("admin", engine_view),
    "/debug/trace": ("admin", trace_file),
    **other_apis(_generate, _vectors, _read),
    **PAGES,
}
