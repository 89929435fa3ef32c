"""Bodies in their declared shapes, each in a request of its own or in a line of a batch."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeVar

import msgspec

from penstock.serving.batch_run import Answer, Answerer
from penstock.serving.chat import ChatTask
from penstock.serving.completions import CompletionTask
from penstock.serving.context import Context
from penstock.serving.edge import parse
from penstock.serving.errors import HTTPError
from penstock.serving.limits import INLINE_BYTES
from penstock.serving.long_ids import refuse_many_values, take_ids
from penstock.serving.response_schemas import ResponsesRequest
from penstock.serving.responses import ResponseTask
from penstock.serving.schemas import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    ModelRequest,
)
from penstock.serving.unread_fields import NotedFields, refuse_unsupported, unknown_fields
from penstock.serving.vectors import EmbeddingRequest, RerankRequest, ScoreRequest, embeddings, ranking, scores

G = TypeVar("G", bound=GenerationRequest)
R = TypeVar("R", bound=ModelRequest)
_log = logging.getLogger(__name__)
_noted = NotedFields()


class Task(Protocol):
    """An admitted request, answered in one of two ways."""

    async def whole(self) -> object: ...

    def chunks(self) -> AsyncGenerator[object, None]: ...


def decode(body: bytes, shape: type[R]) -> R:
    """Raises HTTPError: too_many_values; as ``parse``; what the shape's own ``check`` raises; unsupported_parameter."""
    ids: Mapping[str, object] = {}
    if len(body) > INLINE_BYTES:
        refuse_many_values(body, b":")
        fields, ids = take_ids(parse(body, dict[str, msgspec.Raw]), shape.IDS)
        body = msgspec.json.encode(fields) if ids else body
        refuse_many_values(body, b",")
    asked = parse(body, shape)
    for name, taken in ids.items():
        setattr(asked, name, taken)
    asked.check()
    fields = parse(body, dict[str, msgspec.Raw])
    refuse_unsupported(fields, shape)
    if line := _noted.line(unknown_fields(fields, shape)):
        _log.warning("%s", line)
    return asked


def in_batches() -> dict[str, Answerer]:
    """What may stand in a batch."""

    def generation(shape: type[G], prepare: Callable[[G, Context], Awaitable[Task]]) -> Answerer:
        async def answer(asked: G, context: Context) -> Any:
            return await (await prepare(asked, context)).whole()

        return Answerer(functools.partial(decode, shape=shape), answer)

    def vectors(shape: type[R], answer: Callable[[R, Context], Awaitable[Answer]]) -> Answerer:
        return Answerer(functools.partial(decode, shape=shape), answer)

    async def response(asked: ResponsesRequest, context: Context) -> ResponseTask:
        for name in ("store", "conversation"):
            if getattr(asked, name):
                fix = "leave it out: the answer is in the output file"
                raise HTTPError("invalid_parameter", f"{name} cannot be used in a batch", fix=fix, param=name)
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
