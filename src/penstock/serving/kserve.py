"""The Open Inference Protocol (KServe's V2) and Triton's generate extension.

A model that generates takes ``text_input`` and gives ``text_output``, as Triton's vLLM backend does: ``parameters``, or
the JSON text of an input ``sampling_parameters``, are the fields of a request to /v1/completions. One that makes
vectors gives ``embedding``.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from importlib import metadata
from itertools import chain
from math import prod
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from penstock.serving.completions import CompletionTask
from penstock.serving.context import Context, context_of
from penstock.serving.edge import as_json, nested_too_deeply, shaped
from penstock.serving.errors import HTTPError, invalid, plain_body, unsupported
from penstock.serving.gate import current
from penstock.serving.health import check_welcome
from penstock.serving.limits import MAX_TEXTS
from penstock.serving.long_ids import refuse_many_values
from penstock.serving.model_routes import check_model_ready, in_memory
from penstock.serving.operations import operation
from penstock.serving.priorities import rank
from penstock.serving.schemas import CompletionRequest, Harmless, ModelRequest, Name
from penstock.serving.sse import Dialect, event
from penstock.serving.unread_fields import refuse_unsupported
from penstock.serving.vectors import EmbeddingRequest, embedded
from penstock.spec.ranges import MAX_ID

Body = dict[str, Any]
VERSION = "1"
_OF_VERSION = re.compile(r"/versions/[^/]*$")
TEXT, SAMPLING, EXCLUDE, STREAM = "text_input", "sampling_parameters", "exclude_input_in_output", "stream"
VERBS = ("infer", "generate", "generate_stream")
MAX_TENSORS = 16
MAX_DIMENSIONS = 4


class Tensor(msgspec.Struct, kw_only=True):
    name: Name
    shape: Annotated[list[Annotated[int, Meta(ge=0, le=MAX_TEXTS)]], Meta(max_length=MAX_DIMENSIONS)]
    datatype: str
    data: list[Any]
    parameters: Body | None = None


class WantedOutput(msgspec.Struct, kw_only=True):
    name: Name
    parameters: Body | None = None


class InferRequest(ModelRequest, kw_only=True):
    """POST /v2/models/MODEL/infer"""

    inputs: Annotated[list[Tensor], Meta(min_length=1, max_length=MAX_TENSORS)]
    outputs: Annotated[list[WantedOutput], Meta(max_length=MAX_TENSORS)] | None = None
    parameters: Body | None = None
    id: Name | None = None


class GenerateRequest(ModelRequest, kw_only=True):
    """POST /v2/models/MODEL/generate; what stands beside ``text_input`` may also stand in ``parameters``."""

    HARMLESS: ClassVar[Harmless] = {}

    text_input: str
    parameters: Body | None = None
    sampling_parameters: str | Body | None = None
    exclude_input_in_output: bool | None = None
    stream: bool | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=MAX_ID)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=1e4)] | None = None
    id: Name | None = None

    def check(self) -> None:
        if self.stream:
            raise invalid(STREAM, "streams are at generate_stream")

    def completion(self) -> CompletionRequest:
        """Raises HTTPError: as a request to /v1/completions."""
        own = {name: getattr(self, name) for name in ("max_tokens", "temperature") if getattr(self, name) is not None}
        sampling = self.sampling_parameters or {}
        given = _object(sampling, SAMPLING) if isinstance(sampling, str) else sampling
        fields = own | given | (self.parameters or {})
        excluded = _flag(EXCLUDE, fields.pop(EXCLUDE, self.exclude_input_in_output))
        if fields.pop(STREAM, False) and not self.stream:
            raise invalid(STREAM, "streams are at generate_stream")
        echo = not self.stream and not excluded
        asked = _completion([self.text_input], {"echo": echo, **fields, "stream": bool(self.stream)})
        if self.stream and asked.n not in (None, 1):
            raise invalid("n", "a piece of a stream does not say which answer it is of")
        return asked


class GenerateStreamRequest(GenerateRequest, kw_only=True):
    """POST /v2/models/MODEL/generate_stream"""

    def check(self) -> None:
        self.stream = True


class GenerateTask:
    """One text to go on from, answered whole or piece by piece."""

    def __init__(self, task: CompletionTask, identifier: str | None) -> None:
        self._task, self._named = task, {} if identifier is None else {"id": identifier}

    @classmethod
    async def prepare(cls, request: GenerateRequest, context: Context) -> GenerateTask:
        """Raises HTTPError and InvalidRequest before anything is computed."""
        asked = await asyncio.to_thread(request.completion)
        return cls(await CompletionTask.prepare(asked, context), request.id)

    async def whole(self) -> Body:
        answer = await self._task.whole()
        texts = [choice.text for choice in answer.choices]
        return self._answer(answer.model, texts[0] if len(texts) == 1 else texts)

    async def chunks(self) -> AsyncGenerator[Body, None]:
        async with aclosing(self._task.chunks()) as pieces:
            async for piece in pieces:
                for choice in piece.choices:  # type: ignore[attr-defined]
                    yield self._answer(piece.model, choice.text)  # type: ignore[attr-defined]

    def _answer(self, model: str, text: str | list[str]) -> Body:
        return {**self._named, "model_name": model, "model_version": VERSION, "text_output": text}


async def infer(request: InferRequest, context: Context) -> Body:
    """Raises HTTPError and InvalidRequest before anything is computed."""
    asked, wanted = await asyncio.to_thread(_asked, request, context.llm.engine.generates)
    if isinstance(asked, EmbeddingRequest):
        outputs = await _embedded(asked, context)
    else:
        choices = (await (await CompletionTask.prepare(asked, context)).whole()).choices
        reasons = [choice.finish_reason for choice in choices]
        outputs = [_bytes("text_output", [choice.text for choice in choices]), _bytes("finish_reason", reasons)]
        outputs = [output for output in outputs if output["name"] in (wanted or {"text_output"})]
    named = {} if request.id is None else {"id": request.id}
    return {**named, "model_name": context.name, "model_version": VERSION, "outputs": outputs}


def _asked(request: InferRequest, generates: bool) -> tuple[CompletionRequest | EmbeddingRequest, set[str]]:
    """As a request of OpenAI's API, and the names of the outputs. Raises HTTPError and InvalidRequest."""
    inputs = {tensor.name: _flat(tensor) for tensor in request.inputs}
    if len(inputs) < len(request.inputs):
        raise invalid("inputs", "two have the same name")
    if TEXT not in inputs:
        raise invalid("inputs", f"there is none named {TEXT!r}")
    texts, fields = _texts(inputs, TEXT), dict(request.parameters or {})
    for text in _texts(inputs, SAMPLING)[:1]:
        fields |= _object(text, SAMPLING)
    if any(inputs.get(STREAM, ())) or fields.pop(STREAM, False):
        raise unsupported(STREAM, what="an inference has one answer; streams are at generate_stream")
    excluded = any(_flag(EXCLUDE, flag) for flag in [*inputs.get(EXCLUDE, ()), fields.pop(EXCLUDE, None)])
    wanted = {output.name for output in request.outputs or ()}
    known = {"embedding"} if not generates else {"embedding", "text_output", "finish_reason"}
    if strange := sorted(wanted - known):
        raise invalid("outputs", f"there is no output {strange[0][:64]!r}, but {', '.join(sorted(known))}")
    if "embedding" in wanted and len(wanted) > 1:
        raise invalid("outputs", "embedding comes alone")
    if generates and "embedding" not in wanted:
        return _completion(texts, {"echo": not excluded, **fields}), wanted
    asked = shaped({**fields, "input": texts}, EmbeddingRequest)
    rank(asked, current.get().least_priority)
    return asked, wanted


async def _embedded(asked: EmbeddingRequest, context: Context) -> list[Body]:
    rows = [output.outputs.embedding for output in await embedded(asked, context)]
    data = [number for row in rows for number in row]
    return [{"name": "embedding", "datatype": "FP32", "shape": [len(rows), len(data) // len(rows)], "data": data}]


def _completion(texts: list[str], fields: Body) -> CompletionRequest:
    """Raises HTTPError: (invalid_parameter, unsupported_parameter); InvalidRequest."""
    asked = shaped({**fields, "prompt": texts}, CompletionRequest)
    asked.check()
    refuse_unsupported(fields, CompletionRequest)
    rank(asked, current.get().least_priority)
    return asked


def _flat(tensor: Tensor) -> list[Any]:
    """Its elements, perhaps in lists within lists. Raises HTTPError: (invalid_parameter) its shape says otherwise."""
    data = tensor.data
    for _ in tensor.shape[1:]:
        if set(map(type, data)) == {list}:
            data = list(chain.from_iterable(data))
    if len(data) != prod(tensor.shape):
        raise invalid(f"inputs[{tensor.name[:64]}].data", f"it has {len(data)} elements for the shape {tensor.shape}")
    if tensor.name in (TEXT, SAMPLING) and tensor.datatype != "BYTES":
        raise invalid(f"inputs[{tensor.name}].datatype", "it must be BYTES")
    return data


def _texts(inputs: dict[str, list[Any]], name: str) -> list[str]:
    texts = inputs.get(name, [])
    if not all(isinstance(text, str) for text in texts):
        raise invalid(f"inputs[{name}].data", "its elements must be texts")
    return texts


def _flag(name: str, value: object) -> bool:
    if value not in (None, False, True):
        raise invalid(name, "it must be true or false")
    return bool(value)


def _object(text: str, name: str) -> Body:
    body, value = text.encode(), None
    for sign in (b":", b","):
        refuse_many_values(body, sign)
    if not nested_too_deeply(body):
        with suppress(msgspec.DecodeError):
            value = msgspec.json.decode(body)
    if not isinstance(value, dict):
        raise invalid(name, "it must be the JSON text of an object")
    return value


def _bytes(name: str, data: list[Any]) -> Body:
    return {"name": name, "datatype": "BYTES", "shape": [len(data)], "data": data}


# -- what there is, and whether it is ready ----------------------------------------------------------------------------


@operation("The server, as the Open Inference Protocol tells it.", gives=dict[str, Any])
async def server(_: Request) -> Response:
    return as_json({"name": "penstock", "version": metadata.version("penstock"), "extensions": ["generate"]})


@operation("Whether the process answers.", gives=dict[str, Any])
async def live(_: Request) -> Response:
    return as_json({"live": True})


@operation("Whether new requests are welcome.", gives=dict[str, Any])
async def ready(request: Request) -> Response:
    """Raises Unavailable."""
    check_welcome(context_of(request))
    return as_json({"ready": True})


def check_version(request: Request) -> None:
    """Raises HTTPError: (model_not_found) the path names a version that there is not."""
    if request.path_params.get("version", VERSION) != VERSION:
        raise HTTPError(
            "model_not_found",
            "This server does not have the version of the model that was asked for",
            why=f"each model has the version {VERSION} alone",
            fix=f"ask for /versions/{VERSION}, or leave the version out",
            param="version",
            status=404,
        )


@operation("Whether a model can compute now.", gives=dict[str, Any])
async def model_ready(request: Request) -> Response:
    """Raises Unavailable, and HTTPError: (model_not_found)."""
    check_version(request)
    check_model_ready(context_of(request), request.path_params["model"])
    return as_json({"name": request.path_params["model"], "ready": True})


@operation("Describe a model and its tensors.", gives=dict[str, Any])
async def model(request: Request) -> Response:
    """Raises HTTPError: (model_not_found), and Unavailable: (not_in_memory)."""
    check_version(request)
    context, (name, _, verb) = context_of(request), request.path_params["model"].rpartition("/")
    if name and verb in VERBS:  # a model's name may be a path, so that this route is asked for theirs as well
        context.admit(_OF_VERSION.sub("", name))
        raise HTTPException(405, headers={"Allow": "POST"})
    context = in_memory(context, context.admit(request.path_params["model"]).name)
    engine = context.llm.engine
    vector = {"name": "embedding", "datatype": "FP32", "shape": [-1, engine.spec.hidden]}
    texts = [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in ("text_output", "finish_reason")]
    taken = [(TEXT, "BYTES", -1), (SAMPLING, "BYTES", 1), (EXCLUDE, "BOOL", 1)]
    return as_json(
        {
            "name": context.name,
            "versions": [VERSION],
            "platform": "penstock",
            "inputs": [{"name": name, "datatype": kind, "shape": [size]} for name, kind, size in taken],
            "outputs": [*texts, vector] if engine.generates else [vector],
        }
    )


EVENTS = Dialect(event, b"", lambda error, _: event(plain_body(error)))
