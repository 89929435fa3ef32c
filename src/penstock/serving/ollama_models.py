"""GET /api/tags, /api/ps and /api/version, POST /api/show: what Ollama's clients ask of a server before they use it."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from hashlib import blake2b
from importlib import metadata
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from penstock.serving.context import Context, context_of
from penstock.serving.decoding import decode
from penstock.serving.edge import as_json, body_of
from penstock.serving.model_routes import in_memory
from penstock.serving.models import Models, Served
from penstock.serving.ollama_schemas import LATEST, Body
from penstock.serving.operations import operation
from penstock.serving.schemas import ModelRequest, Name
from penstock.spec import ModelSpec
from penstock.spec.encoder import encoder_parameters, encoder_weight_bytes
from penstock.spec.sizing import parameters, weight_bytes
from penstock.text import gap_tokens

NEVER = "9999-12-31T23:59:59Z"
"""When a model leaves that stays."""


class ShowRequest(ModelRequest, kw_only=True):
    """POST /api/show"""

    name: Name | None = None
    verbose: bool | None = None

    def check(self) -> None:
        asked = self.model or self.name
        self.model = None if asked is None else asked.removesuffix(LATEST)


@operation("Ollama: list the models.", gives=dict[str, Any])
async def tags(request: Request) -> Response:
    context = context_of(request)
    return as_json({"models": [_listed(context.of(model)) for model in context.models.all.values()]})


@operation("Ollama: list the models in memory.", gives=dict[str, Any])
async def running(request: Request) -> Response:
    context, told = context_of(request), []
    for model in context.models.all.values():
        if model.llm is not None:
            end, longest = _end(context.models, model), model.llm.engine.config.max_model_len
            told.append(_listed(context.of(model)) | {"expires_at": end, "size_vram": 0, "context_length": longest})
    return as_json({"models": told})


def _end(models: Models, model: Served) -> str:
    """When it leaves if nothing asks for it any more."""
    resident, now = models.policy.models[model.name], time.monotonic()
    if resident.keep_alive is None or resident.stay.pinned:
        return NEVER
    return _time(time.time() + resident.keep_alive - (0.0 if resident.running else now - resident.used))


@operation("Ollama: the version.", gives=dict[str, Any])
async def version(_: Request) -> Response:
    return as_json({"version": metadata.version("penstock")})


@operation("Ollama: describe a model.", takes=ShowRequest, gives=dict[str, Any])
async def show(request: Request) -> Response:
    """Of one in memory: who looks at all models shall not have them all loaded. Raises HTTPError: as ``Context.admit``,
    and Unavailable: (not_in_memory).
    """
    context = context_of(request)
    async with body_of(request) as body:
        asked = decode(body, ShowRequest)
    return as_json(_shown(in_memory(context, context.admit(asked.model).name)))


def _shown(context: Context) -> Body:
    engine = context.llm.engine
    spec, formats = engine.spec, engine.formats
    abilities = {
        "completion": engine.generates,
        "embedding": not engine.generates,
        "tools": engine.generates and engine.chat is not None and formats.calls is not None,
        "thinking": engine.generates and formats.thoughts is not None,
        "insert": engine.generates and gap_tokens(engine.tokenizer) is not None,
    }
    return {
        "license": "",
        "modelfile": "",
        "parameters": "\n".join(f"{name} {value}" for name, value in engine.recommended.items()),
        "template": engine.chat.source if engine.chat is not None else "",
        "details": _details(context),
        "model_info": {
            "general.architecture": spec.family,
            "general.parameter_count": _size(context)[0],
            f"{spec.family}.context_length": engine.config.max_model_len,
            f"{spec.family}.embedding_length": spec.hidden,
            f"{spec.family}.block_count": spec.layers,
            f"{spec.family}.attention.head_count": spec.heads,
        },
        "capabilities": [name for name, able in abilities.items() if able],
        "modified_at": _time(context.served.created),
    }


def _listed(context: Context) -> Body:
    """``digest`` names the weights and their arithmetic: servers with the same one give the same answers. Of a model
    that is not in memory its name is known, and no more.
    """
    named = {"name": context.name, "model": context.name, "modified_at": _time(context.served.created)}
    if context.served.llm is None:
        return named
    digest = blake2b(context.llm.engine.setup.numerics_id, digest_size=32).hexdigest()
    return named | {"size": _size(context)[1], "digest": digest, "details": _details(context)}


def _details(context: Context) -> Body:
    engine, count = context.llm.engine, _size(context)[0]
    unit, letter = next(((u, x) for u, x in ((10**9, "B"), (10**6, "M"), (10**3, "K")) if count >= u), (1, ""))
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": engine.spec.family,
        "families": [engine.spec.family],
        "parameter_size": f"{count / unit:.1f}{letter}",
        "quantization_level": engine.config.dtype if engine.config.quant == "none" else engine.config.quant,
    }


def _size(context: Context) -> tuple[int, int]:
    """(parameters, bytes of its weights in memory)."""
    engine = context.llm.engine
    dtype = engine.spec.dtype if engine.config.dtype == "auto" else engine.config.dtype
    if not isinstance(engine.spec, ModelSpec):
        return encoder_parameters(engine.spec), encoder_weight_bytes(engine.spec, dtype)
    return parameters(engine.spec), weight_bytes(engine.spec, dtype, engine.config.quant)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
