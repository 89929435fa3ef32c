"""GET /api/tags, /api/ps and /api/version, POST /api/show: what Ollama's clients ask of a server before they use it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import blake2b, sha256
from importlib import metadata
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from penstock.assemble import Assembled, find_here
from penstock.base import PenstockError
from penstock.serving.context import context_of
from penstock.serving.edge import as_json
from penstock.serving.models import Models, Served
from penstock.serving.ollama_schemas import LATEST, Body
from penstock.serving.operations import operation
from penstock.serving.schemas import ModelRequest, Name
from penstock.spec import Dtype, EncoderSpec, EngineConfig, ModelSpec
from penstock.spec.encoder import encoder_parameters, encoder_weight_bytes, read_any_spec
from penstock.spec.generation import read_recommended
from penstock.spec.pooling import read_pooling
from penstock.spec.sizing import parameters, weight_bytes
from penstock.text import ChatTemplate, gap_tokens, load_chat_template
from penstock.text.parsers import Formats, formats_of

NEVER = "9999-12-31T23:59:59Z"
"""When a model leaves that stays."""


class ShowRequest(ModelRequest, kw_only=True):
    """POST /api/show"""

    name: Name | None = None
    verbose: bool | None = None

    def check(self) -> None:
        asked = self.model or self.name
        self.model = None if asked is None else asked.removesuffix(LATEST)


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """A model as Ollama's clients are told of it.

    Attributes:
        digest: of one in memory, of its weights and their arithmetic: servers with the same one give the same answers.
            Of another it names the model and does not hash what is in it: of its name and its place.
        size: bytes of its weights in memory; or of its files, 0 where they are not on this machine.
        spec: None if it is not in memory, and no file says what it is.
        abilities: of one that is not in memory those that show without its tokenizer.
    """

    name: str
    created: int
    config: EngineConfig
    digest: str
    size: int = 0
    spec: ModelSpec | EncoderSpec | None = None
    template: str = ""
    recommended: Mapping[str, Any] = field(default_factory=dict)
    abilities: Mapping[str, bool] = field(default_factory=dict)


@operation("Ollama: list the models.", gives=dict[str, Any])
async def tags(request: Request) -> Response:
    """Those that are not in memory as their files tell."""
    each = [await _about(model) for model in context_of(request).models.all.values()]
    return as_json({"models": [_listed(about) for about in each]})


@operation("Ollama: list the models in memory.", gives=dict[str, Any])
async def running(request: Request) -> Response:
    context, told = context_of(request), []
    for model in context.models.all.values():
        if model.llm is not None:
            end, longest = _end(context.models, model), model.llm.engine.config.max_model_len
            about = _of_engine(model, model.llm.engine)
            told.append(_listed(about) | {"expires_at": end, "size_vram": 0, "context_length": longest})
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


async def show(
    request: Request, shape: type[ShowRequest], read: Callable[..., Awaitable[tuple[ShowRequest, int]]]
) -> Response:
    """Loads nothing: who looks at all models shall not have them all loaded. It is one of its tenant's requests all the
    same. Raises HTTPError: as ``Context.admit``; Unavailable."""
    asked, _ = await read(request, shape)
    return as_json(_shown(await _about(context_of(request).admit(asked.model))))


async def _about(model: Served) -> About:
    if model.llm is not None:
        return _of_engine(model, model.llm.engine)
    return await asyncio.to_thread(_of_files, model)


def _of_engine(model: Served, engine: Assembled) -> About:
    return About(
        name=model.name,
        created=model.created,
        config=engine.config,
        digest=blake2b(engine.setup.numerics_id, digest_size=32).hexdigest(),
        size=_size(engine.spec, engine.config)[1],
        spec=engine.spec,
        template=engine.chat.source if engine.chat is not None else "",
        recommended=engine.recommended,
        abilities={
            **_abilities(engine.generates, engine.chat, engine.formats),
            "insert": engine.generates and gap_tokens(engine.tokenizer) is not None,
        },
    )


def _of_files(model: Served) -> About:
    """What its configuration says and its template shows; neither weights nor a tokenizer are read."""
    config, place = model.config, find_here(model.config.model)
    named = sha256(f"{model.name}\n{place or config.model}".encode()).hexdigest()
    about = About(name=model.name, created=model.created, config=config, digest=named)
    if place is None:
        return about
    try:
        about = replace(about, size=_file_bytes(place))
        spec, chat = read_any_spec(place), load_chat_template(place, config.chat_template)
        formats = formats_of(chat, (), calls=config.tool_parser, thoughts=config.reasoning_parser)
        generates = isinstance(spec, ModelSpec) and not read_pooling(place, spec).headless
        return replace(
            about,
            spec=spec,
            template=chat.source if chat is not None else "",
            recommended=read_recommended(place) if config.generation_config == "auto" else {},
            abilities=_abilities(generates, chat, formats),
        )
    except (PenstockError, OSError):  # what is wrong is told to whoever asks for an answer of it
        return about


def _file_bytes(place: Path) -> int:
    files = [place] if place.is_file() else [path for path in place.iterdir() if path.is_file()]
    return sum(path.stat().st_size for path in files)


def _abilities(generates: bool, chat: ChatTemplate | None, formats: Formats) -> dict[str, bool]:
    return {
        "completion": generates,
        "embedding": not generates,
        "tools": generates and chat is not None and formats.calls is not None,
        "thinking": generates and formats.thoughts is not None,
    }


def _shown(about: About) -> Body:
    return {
        "license": "",
        "modelfile": "",
        "parameters": "\n".join(f"{name} {value}" for name, value in about.recommended.items()),
        "template": about.template,
        "details": _details(about),
        "model_info": {} if about.spec is None else _info(about.spec, about.config),
        "capabilities": [name for name, able in about.abilities.items() if able],
        "modified_at": _time(about.created),
    }


def _info(spec: ModelSpec | EncoderSpec, config: EngineConfig) -> Body:
    return {
        "general.architecture": spec.family,
        "general.parameter_count": _size(spec, config)[0],
        f"{spec.family}.context_length": config.max_model_len or spec.max_positions,
        f"{spec.family}.embedding_length": spec.hidden,
        f"{spec.family}.block_count": spec.layers,
        f"{spec.family}.attention.head_count": spec.heads,
    }


def _listed(about: About) -> Body:
    return {
        "name": about.name,
        "model": about.name,
        "modified_at": _time(about.created),
        "size": about.size,
        "digest": about.digest,
        "details": _details(about),
    }


def _details(about: About) -> Body:
    """Texts are empty where nothing is known, as in Ollama's own: its clients read each of them."""
    spec, config = about.spec, about.config
    if spec is None:
        family, count, dtype = "", "", ""
    else:
        family, count, dtype = spec.family, _count(_size(spec, config)[0]), _dtype(spec, config)
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": count,
        "quantization_level": dtype if config.quant == "none" else config.quant,
    }


def _count(parameters: int) -> str:
    units = (10**9, "B"), (10**6, "M"), (10**3, "K")
    unit, letter = next(((u, x) for u, x in units if parameters >= u), (1, ""))
    return f"{parameters / unit:.1f}{letter}"


def _dtype(spec: ModelSpec | EncoderSpec, config: EngineConfig) -> Dtype:
    return spec.dtype if config.dtype == "auto" else config.dtype


def _size(spec: ModelSpec | EncoderSpec, config: EngineConfig) -> tuple[int, int]:
    """(parameters, bytes of its weights in memory)."""
    dtype = _dtype(spec, config)
    if not isinstance(spec, ModelSpec):
        return encoder_parameters(spec), encoder_weight_bytes(spec, dtype)
    return parameters(spec), weight_bytes(spec, dtype, config.quant)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
