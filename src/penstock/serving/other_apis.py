"""Routes of Ollama's API, of the Open Inference Protocol, and of Triton's generate extension."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from penstock.serving import kserve, ollama, ollama_models, ollama_schemas
from penstock.serving.gate import Access

Endpoint = Callable[[Request], Awaitable[ASGIApp]]
Generate = Callable[..., Awaitable[ASGIApp]]
"""(request, shape, prepare, dialect): answers with what the model generates, whole or in a stream."""
Answer = Callable[..., Awaitable[ASGIApp]]
"""(request, shape, answer): answers with one value."""
Entry = tuple[Access, Endpoint] | tuple[Access, Endpoint, str]


def other_apis(generate: Generate, answer: Answer) -> dict[str, Entry]:
    """By path, as the table of routes has them."""

    def post(how: Callable[..., Awaitable[ASGIApp]], *rest: Any) -> Entry:
        async def endpoint(request: Request) -> ASGIApp:
            return await how(request, *rest)

        return "inference", endpoint, "POST"

    generated = kserve.GenerateTask.prepare
    of_model = "/v2/models/{model:path}"
    return {
        "/api/chat": post(generate, ollama_schemas.OllamaChat, ollama.OllamaTask.chat, ollama.LINES),
        "/api/generate": post(generate, ollama_schemas.OllamaGenerate, ollama.OllamaTask.generate, ollama.LINES),
        "/api/embed": post(answer, ollama_schemas.OllamaEmbed, ollama.embed),
        "/api/embeddings": post(answer, ollama_schemas.OllamaEmbedding, ollama.embedding),
        "/api/show": post(answer, ollama_models.ShowRequest, ollama_models.show),
        "/api/tags": ("inference", ollama_models.tags),
        "/api/ps": ("inference", ollama_models.running),
        "/api/version": ("inference", ollama_models.version),
        "/v2": ("inference", kserve.server),
        "/v2/health/live": ("public", kserve.live),
        "/v2/health/ready": ("inference", kserve.ready),
        of_model + "/infer": post(answer, kserve.InferRequest, kserve.infer),
        of_model + "/generate": post(generate, kserve.GenerateRequest, generated, kserve.EVENTS),
        of_model + "/generate_stream": post(generate, kserve.GenerateStreamRequest, generated, kserve.EVENTS),
        of_model + "/ready": ("inference", kserve.model_ready),
        of_model: ("inference", kserve.model),
    }
